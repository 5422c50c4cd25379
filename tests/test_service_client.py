"""The client: a question, a file, a conversation; busy, failing and absent services."""

import asyncio
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from finetune.errors import UserError
from llm_code.service.client import read_questions
from llm_code.service.client_api import Client, Refused
from llm_code.service.server import parse_args, service_settings
from llm_code.service.settings import api_keys, own_key
from tests.conftest import REPOSITORY
from tests.raw_http import Raw
from tests.service_process import ServiceProcess, until
from tests.terminal import Terminal

KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    settings = {"api_keys": [KEY]}
    process = ServiceProcess(tmp_path_factory.mktemp("service") / "log", settings, {"max_batch": 2, "max_queue": 0})
    yield process
    assert process.stop() == 0


def client(service, *flags, text=None, key=KEY):
    command = [sys.executable, "-m", "llm_code.service.client", "--url", str(service.http.base_url), *flags]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8", **({"API_KEY": key} if key else {})}
    return subprocess.run(command, cwd=REPOSITORY, input=text, capture_output=True, text=True, env=environment)


def test_one_question(service):
    done = client(service, "--question", "say 你好", "--max_tokens", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "你\n", "")


SEPARATORS = "一\u2028二\u2029三\x85四"  # line ends to Python's splitlines, bare in JSON


def test_line_separators_in_question_and_answer(service, tmp_path):
    assert client(service, "--question", f"say {SEPARATORS}").stdout == f"{SEPARATORS}\n"
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"query": f"say {SEPARATORS}"}, ensure_ascii=False) + f"\r\nsay {SEPARATORS}")
    done = client(service, "--file", str(questions))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["answer"] for line in done.stdout.rstrip("\n").split("\n")] == [SEPARATORS] * 2


def test_a_file_in_order_with_failures_in_their_place(service, tmp_path):
    """More questions at a time than the service takes: refused ones come back when told to."""
    questions = tmp_path / "questions.txt"
    rows = ["say 一", "", '{"query": "say 二"}', "fail 0", '{"messages": [{"role": "user", "content": "say 三"}]}']
    questions.write_text("\ufeff" + "\n".join([*rows, "say 四"]), encoding="utf-8")
    done = client(service, "--file", str(questions), "--output", str(tmp_path / "out.jsonl"), "--concurrency", "5")
    assert done.returncode == 1 and done.stdout == ""
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["query"] for row in answers] == ["say 一", "say 二", "fail 0", "say 三", "say 四"]
    assert [row.get("answer") for row in answers] == ["一", "二", None, "三", "四"]
    assert "computation" in answers[2]["error"]


def test_the_progress_bar_on_a_terminal(service, tmp_path):
    (tmp_path / "questions.txt").write_text("say a\n" * 3)
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "llm_code.service.client", "--url", str(service.http.base_url)]
    command += ["--file", str(tmp_path / "questions.txt"), "--output", os.devnull]
    done = subprocess.run(command, cwd=REPOSITORY, stderr=slave, env={**os.environ, "API_KEY": KEY})
    os.close(slave)
    assert done.returncode == 0 and b"3/3" in os.read(master, 65536)
    os.close(master)


def test_a_conversation_remembers(service):
    """The scripted engine answers a text that is no command with the whole prompt: so with what was said before."""
    done = client(service, "--system", "be brief", text="say 你\n\nhello\n")
    assert done.returncode == 0
    assert done.stdout.split("\x1e") == ["你\nbe brief", "say 你", "你", "hello\n"]


def test_a_conversation_longer_than_the_context_goes_on_without_its_oldest_turns(service):
    text = f"say {'a' * 800}\nsay {'b' * 800}\nsay c\nsay {'d' * 1200}\n"
    done = client(service, "--max_tokens", "2500", "--system", "brief", text=text)
    assert (done.returncode, done.stdout.split()) == (0, ["a" * 800, "b" * 800, "c", "d" * 1200])
    dropped = [line for line in done.stderr.splitlines() if "turns were dropped" in line]
    assert [line.split("oldest ")[1].split()[0] for line in dropped] == ["1", "1"]
    alone = client(service, "--max_tokens", "4000", text=f"say {'a' * 800}\n")
    assert alone.returncode == 2 and alone.stderr.rstrip().endswith("Shorten either.")


def test_commands_of_a_conversation(service):
    done = client(service, "--system", "brief", text="say 你\n/reset\nhello\n/restet\n/help\n/exit\nsay never\n")
    assert done.returncode == 0 and done.stdout.split("\x1e") == ["你\nbrief", "hello\n"]
    notices = done.stderr.splitlines()
    assert notices[:2] == ["the conversation starts anew", "unknown command /restet"]
    assert len([line for line in notices if line.startswith("/reset ")]) == 2


@pytest.fixture
def terminal(service, monkeypatch):
    """A conversation on a terminal, at its first prompt."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("API_KEY", KEY)
    terminal = Terminal([sys.executable, "-m", "llm_code.service.client", "--url", str(service.http.base_url)])
    terminal.wait_for("> ")
    yield terminal
    with suppress(ProcessLookupError):
        os.kill(terminal.process, signal.SIGKILL)
        terminal.status()
    os.close(terminal.fd)


def interrupted(terminal):
    """One Ctrl-C; what came before the program's last word, and nothing behind it."""
    terminal.type("\x03")
    before = terminal.wait_for("interrupted\r\n", timeout=5)
    until(lambda: os.waitid(os.P_PID, terminal.process, os.WEXITED | os.WNOHANG | os.WNOWAIT), seconds=5)
    with suppress(OSError):  # EIO: the terminal has no program any more
        terminal.seen += os.read(terminal.fd, 65536).decode()
    assert terminal.status() == 130 and terminal.seen == "" and "Traceback" not in before


@pytest.mark.parametrize("turns", [0, 2])
def test_control_c_at_the_prompt_ends_the_conversation(terminal, turns):
    for _ in range(turns):
        terminal.type("say x\n")
        terminal.wait_for("x\r\n> ")
    interrupted(terminal)


def test_control_c_in_an_answer_ends_the_conversation(service, terminal):
    terminal.type("endless\n")
    terminal.wait_for("abcdef")
    interrupted(terminal)
    until(lambda: service.metric("llm_engine_running ") == 0)


def test_control_d_ends_the_conversation(terminal):
    terminal.type("say x\n")
    terminal.wait_for("x\r\n> ")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_a_conversation_from_a_file_with_half_a_character(service, tmp_path):
    """Under either way Python has of reading what is no UTF-8, and without a line end at the end."""
    command = [sys.executable, "-m", "llm_code.service.client", "--url", str(service.http.base_url)]
    lines = tmp_path / "lines"
    lines.write_bytes(b"say \xe4\xbd\nsay \xe4\xbd\xa0\r\nsay end")
    for handler in ("strict", "surrogateescape"):
        environment = {**os.environ, "API_KEY": KEY, "PYTHONIOENCODING": f"utf-8:{handler}"}
        with lines.open() as stdin:
            done = subprocess.run(command, cwd=REPOSITORY, stdin=stdin, capture_output=True, env=environment)
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "\ufffd\n你\nend\n", b"")


def test_another_program_at_the_port_is_told_in_a_line():
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-m", "llm_code.service.client", "--url", url, "--question", "x"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "<" not in done.stderr
    assert f"something else than the service listens at 127.0.0.1:{server.server_port}" in done.stderr


def test_errors_in_one_line(service, tmp_path):
    refused = client(service, "--question", "x", key=None)
    assert refused.returncode == 2 and "401" in refused.stderr and "API_KEY" in refused.stderr
    failed = client(service, "--question", "fail 2")
    assert failed.returncode == 2 and "computation" in failed.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    foreign, fine = tmp_path / "gbk.txt", tmp_path / "fine.txt"
    foreign.write_text("你好\n", encoding="gbk")
    fine.write_text("say x\n")
    for flags, word in [
        (["--file", str(tmp_path / "none")], "expected a file of questions, but No such file"),
        (["--file", str(empty)], "one question a line"),
        (["--file", "好" * 100], "File name too long"),
        (["--file", str(foreign)], f"{foreign}: expected a file of questions in UTF-8, found byte 0xc4"),
        (["--file", str(fine), "--output", str(tmp_path / "nodir" / "x.jsonl")], "but No such file or directory"),
        (["--file", str(fine), "--output", str(tmp_path)], "but Is a directory"),
        (
            ["--url", "http://127.0.0.1:abc"],
            "expected an address like http://127.0.0.1:10820, got http://127.0.0.1:abc",
        ),
        (["--url", "http://127.0.0.1:70000"], "Port out of range 0-65535"),
        (["--url", "127.0.0.1:10820"], "expected an address like http://127.0.0.1:10820, got 127.0.0.1:10820"),
    ]:
        done = client(service, *flags)
        told = done.stderr[done.stderr.rindex("error: ") :]  # argparse has its usage before it
        assert done.returncode == 2 and word in told and told.count("\n") == 1, done.stderr


@pytest.mark.parametrize("flag", ["--question", "--system"])
def test_words_of_a_terminal_in_gbk_are_refused(service, flag):
    done = client(service, flag, os.fsdecode("你好".encode("gbk")))
    assert done.returncode == 2 and "expected text in UTF-8" in done.stderr and "Traceback" not in done.stderr


def test_bad_lines_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    no_conversations = ("[]", "5", '"x"', "[1]", '[{"role": "user"}]', '[{"role": "user", "content": null}]')
    rows = [f'{{"messages": {value}, "query": "x"}}' for value in no_conversations]
    for line in ("{", '{"a": 1}', '{"query": 5}', *rows):
        path.write_text(f"fine\n{line}\n")
        with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
            read_questions(path, None)
    path.write_text("fine\n")
    assert [message["role"] for message in read_questions(path, "system")[0]] == ["system", "user"]


def ask(url, patience, handler=None):
    """The client's answer from a service, or from a function that plays one."""

    async def run():
        async with Client(url, KEY, patience=patience) as client:
            if handler:
                await client._http.aclose()
                client._http = httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(handler))
            return await client.answer([{"role": "user", "content": "say 好"}])

    return asyncio.run(run())


def test_a_full_service_is_asked_again_when_it_says(service):
    key = [f"Authorization: Bearer {KEY}"]
    body = {"messages": [{"role": "user", "content": "endless"}], "stream": True, "max_tokens": 300}
    full = [Raw(service.port).request("POST", "/v1/chat/completions", body, key) for _ in range(2)]
    until(lambda: service.metric("llm_engine_running ") == 2)
    with pytest.raises(Refused, match="429"):
        ask(str(service.http.base_url), 0.1)
    assert ask(str(service.http.base_url), 60) == "好"
    assert service.metric('llm_rejected_total{reason="queue_full"}') >= 2
    for raw in full:
        raw.close()


def test_retry_after_is_kept_and_patience_ends():
    times = []

    def busy_once(request):
        times.append(time.monotonic())
        if len(times) == 1:
            return httpx.Response(503, headers={"Retry-After": "1"}, json={"error": {"message": "loading"}})
        chunk = {"choices": [{"delta": {"content": "好"}, "finish_reason": "stop"}]}
        return httpx.Response(200, text=f": comment\n\ndata: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    assert ask("http://service", 30, busy_once) == "好"
    assert len(times) == 2 and times[1] - times[0] >= 1.0
    asked = []

    def never(request):
        asked.append(request)
        return httpx.Response(504, headers={"x-should-retry": "false"}, text="<html>")

    with pytest.raises(Refused, match="504: <html>"):
        ask("http://service", 30, never)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "events, message",
    [
        ('data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n', "broke off"),
        ('data: {"error": {"message": "no memory"}}\n\ndata: [DONE]\n\n', "no memory"),
        ("", "broke off"),
        ('data: {"choices": [{\n\n', "no JSON in the stream"),
    ],
)
def test_streams_that_end_badly_are_no_answers(events, message):
    with pytest.raises(Refused, match=message):
        ask("http://service", 5, lambda request: httpx.Response(200, text=events))


def test_a_stream_in_pieces_of_any_size():
    """Lines and characters end where they end, not where the network cuts."""
    chunk = {"choices": [{"delta": {"content": SEPARATORS}, "finish_reason": "stop"}]}
    body = f": {SEPARATORS}\r\n\r\ndata:{json.dumps(chunk, ensure_ascii=False)}\r\n\r\ndata: [DONE]".encode()

    async def cut(size):
        for begin in range(0, len(body), size):
            yield body[begin : begin + size]

    for size in (1, 2, 7, len(body)):
        assert ask("http://service", 5, lambda request, size=size: httpx.Response(200, content=cut(size))) == SEPARATORS


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("", ()),
        (" , ", ()),
        ("only-one-key", ("only-one-key",)),
        (" first-key , second-key,", ("first-key", "second-key")),
    ],
)
def test_the_keys_of_the_settings(monkeypatch, value, keys):
    monkeypatch.setenv("API_KEY", value)
    assert api_keys() == keys and own_key() == (keys[0] if keys else None)
    monkeypatch.setattr(sys, "argv", ["server", "--model_name_or_path", "x"])
    assert service_settings(parse_args()).api_keys == keys


def test_the_client_sends_the_first_key(service):
    assert client(service, "--question", "say x", key=f" {KEY} , another-key").stdout == "x\n"


def test_nobody_there():
    with pytest.raises(Refused, match="make baichuan-serve"):
        ask("http://127.0.0.1:1", 0.2)
