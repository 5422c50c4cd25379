"""The life of the process (faults F39 to F43): starting, draining, dying, refusing to start, and what it logs."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_code.service.logs import SafeFormatter
from tests.conftest import REPOSITORY
from tests.raw_http import Raw
from tests.service_process import ServiceProcess, until

CHAT = "/v1/chat/completions"
SLOW = {"step_seconds": 0.01, "max_batch": 3, "max_queue": 5}


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_f39_a_signal_while_idle(tmp_path, number):
    service = ServiceProcess(tmp_path / "log")
    service.send_signal(number)
    assert service.process.wait(10) == 0 and is_free(service.port)
    assert "Traceback" not in service.log()


def test_f39_a_drain_with_three_running_and_five_queued(tmp_path):
    service = ServiceProcess(tmp_path / "log", engine=SLOW)
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(service.chat, "endless", max_tokens=150) for _ in range(2)]
        stream = Raw(service.port).chat("endless", stream=True, max_tokens=150)
        until(lambda: service.metric("llm_engine_running ") == 3)
        queued = [threads.submit(service.chat, "say x", stream=place % 2 == 0) for place in range(5)]
        until(lambda: service.metric("llm_engine_waiting") == 5)
        service.send_signal()
        for future in queued:
            assert future.result().status_code == 503 and future.result().headers["Retry-After"]
        # Still there for those who ask, and honest about it.
        assert service.http.get("/ready").status_code == 503
        assert service.http.get("/health").json() == {"status": "draining"}
        refused = service.chat("say x")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert [future.result().json()["usage"]["completion_tokens"] for future in running] == [150, 150]
        assert stream.read_until(b"[DONE]").count(b'"content":"') == 151  # the role's, and one a token
    assert service.process.wait(10) == 0 and is_free(service.port)


def test_f39_the_limit_of_a_drain(tmp_path):
    """What is not finished by then is ended with an error, and the exit is clean all the same."""
    service = ServiceProcess(tmp_path / "log", {"drain_seconds": 0.4}, SLOW)
    stream = Raw(service.port).chat("endless", stream=True, max_tokens=4000)
    stream.read_until(b"\n\n")
    service.send_signal()
    assert b'"code":"shutting_down"' in stream.read_until(b"[DONE]")
    assert service.process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f39_the_second_signal_is_now(tmp_path, number):
    service = ServiceProcess(tmp_path / "log", engine=SLOW)
    Raw(service.port).chat("endless", stream=True, max_tokens=4000).read_until(b"\n\n")
    service.send_signal()
    service.wait_for("draining")
    service.send_signal(number)
    assert service.process.wait(5) == 128 + number and is_free(service.port)


def test_f39_f42_loading_and_a_signal_meanwhile(tmp_path):
    service = ServiceProcess(tmp_path / "log", engine={"load_seconds": 60}, wait=False)
    assert service.http.get("/health").json() == {"status": "loading"}
    ready = service.http.get("/ready")
    assert ready.status_code == 503 and ready.headers["Retry-After"]
    for path in (CHAT, "/v1/completions", "/internal/ask"):
        response = service.http.post(path, json={})
        assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
        assert response.headers["Retry-After"]
    assert service.http.get("/v1/models").status_code == 503
    assert service.metric("llm_ready") == 0
    service.send_signal()
    assert service.process.wait(5) == 0  # a load of a minute holds nobody up


def test_f42_ready_once_loaded(tmp_path):
    service = ServiceProcess(tmp_path / "log", engine={"load_seconds": 0.3}, wait=False)
    until(lambda: service.http.get("/ready").status_code == 200)
    assert service.chat("say x").status_code == 200
    assert service.stop() == 0


def test_f40_the_port_is_free_again_after_a_kill(tmp_path):
    service = ServiceProcess(tmp_path / "log", engine=SLOW)
    streams = [Raw(service.port).chat("endless", stream=True) for _ in range(3)]
    for stream in streams:
        stream.read_until(b"\n\n")
    service.process.kill()
    service.process.wait()
    again = ServiceProcess(tmp_path / "log2", {"port": service.port})
    assert again.port == service.port and again.chat("say x").status_code == 200
    assert again.stop() == 0


def run(*flags, **environment):
    """The service's program; it must end by itself."""
    command = [sys.executable, "-m", "llm_code.service.server", *flags]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, env={**os.environ, **environment}
    )


def assert_one_line(done, *words):
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_f41_a_port_in_use(tiny_baichuan):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--model_name_or_path", str(tiny_baichuan), "--port", port)
    assert_one_line(done, port, "in use", "BAICHUAN_PORT")


def test_f41_models_that_cannot_be_served(tmp_path, tiny_baichuan):
    assert_one_line(
        run("--model_name_or_path", str(tmp_path / "none")), "found nothing there", "make baichuan-download"
    )
    (tmp_path / "config.json").write_text("{}")
    assert_one_line(run("--model_name_or_path", str(tmp_path)), "weights")


def test_f41_an_adapter_of_another_model(tmp_path, tiny_baichuan):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/another"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    done = run("--model_name_or_path", str(tiny_baichuan), "--adapter_name_or_path", str(tmp_path))
    assert_one_line(done, "another", str(tiny_baichuan))


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--host", "0.0.0.0"], "API_KEY"),
        (["--port", "70000"], "65535"),
        (["--max_batch", "0"], "--max_batch"),
        (["--max_queue", "-1"], "--max_queue"),
        (["--drain_seconds", "-1"], "--drain_seconds"),
        (["--request_seconds", "nan"], "--request_seconds"),
        (["--engine", "vllm", "--host", "::"], "API_KEY"),
        (["--engine", "vllm"], "pip install vllm"),
        (["--host", "203.0.113.7", "--port", "0"], "203.0.113.7"),
    ],
)
def test_f41_bad_settings(tiny_baichuan, flags, word):
    key = "a-key-that-is-long" if flags[1] == "203.0.113.7" else ""  # an address that is not this machine's
    assert_one_line(run("--model_name_or_path", str(tiny_baichuan), *flags, API_KEY=key), word)


def test_f41_what_only_loading_finds_out_is_one_line_too(tmp_path):
    service = ServiceProcess(tmp_path / "log", engine={"refusal": "the cache is too small"}, wait=False)
    assert service.process.wait(10) == 2
    assert [line for line in service.log().splitlines() if " INFO " not in line] == ["error: the cache is too small"]


def test_a_bug_while_loading_ends_the_process_and_keeps_its_traceback(tmp_path):
    service = ServiceProcess(tmp_path / "log", engine={"load_seconds": "no number"}, wait=False)
    assert service.process.wait(10) == 1
    assert "TypeError" in service.log()


def test_f43_what_clients_send_cannot_forge_a_line_of_the_log(tmp_path):
    service = ServiceProcess(tmp_path / "log")
    secret = "my-private-question"
    service.chat(f"say {secret}", model="evil\r\n2026-01-01 00:00:00,000 INFO forged \x1b[31m")
    service.chat(f"say {secret}")
    service.chat(f"{secret} " + "x" * 1_000_000)
    service.http.get("/internal/ask", params={"query": f"say {secret}"})
    service.http.get("/evil%0d%0a2026-01-01%20INFO%20forged%1b%5b31m" + "x" * 3000)
    for value in ("evil id", "x" * 5000, "a\tb"):
        echoed = service.http.get("/health", headers={"X-Request-Id": value}).headers["x-request-id"]
        assert echoed != value
    assert service.http.get("/health", headers={"X-Request-Id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    assert service.chat("fail 0").status_code == 500
    assert service.stop() == 0
    lines = service.log().splitlines()
    assert all(line.startswith(("20", "  | ")) and len(line) < 2100 and line.isprintable() for line in lines)
    assert not any(line.startswith("2026-01-01") for line in lines)
    assert secret not in service.log()
    assert sum(" POST " in line for line in lines) == 4 and sum(" GET " in line for line in lines) == 6


def test_f43_the_formatter():
    formatter = SafeFormatter()

    def formatted(message, error=None):
        info = (type(error), error, error.__traceback__) if error else None
        return formatter.format(logging.LogRecord("a", logging.INFO, "f", 1, message, (), info))

    assert "\n" not in formatted("a\r\nb\u2028c\u202ed\x85e") and "a\\x0d\\x0ab" in formatted("a\r\nb")
    assert len(formatted("x" * 1_000_000)) < 2100
    assert "\ud83d" not in formatted("half \ud83d")
    trace = formatted("failed", ValueError("x\n2026-01-01 INFO forged")).split("\n")
    assert trace[1:] and all(line.startswith("  | ") for line in trace[1:])
