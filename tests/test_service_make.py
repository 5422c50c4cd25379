"""The service through the front door: make, in the background, killed and started again; vLLM's command line."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.service_process import until


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def served(make, tmp_path, tiny_qwen):
    """make with settings for the service; what it left running is stopped."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "llm_env").symlink_to(REPOSITORY / ".venv")
    settings = {"ENVS_DIR": str(tmp_path / "envs"), "LLM_MODULE_MODEL_PATH": str(tiny_qwen), "API_KEY": "a-key-of-ours"}
    settings["BAICHUAN_PORT"] = str(free_port())

    def run(*arguments, **more):
        return make(*arguments, environment={**settings, **more})

    yield run
    run("stop", "STEP=baichuan-serve")


def test_f40_serve_ask_kill_serve_again_and_stop(served, checkout):
    started = served("baichuan-serve", BG="1")
    assert started.returncode == 0, started.stderr
    log = checkout / "logs" / "baichuan-serve.log"
    until(lambda: "ready: " in log.read_text() or "error" in log.read_text(), 60)
    answered = served("baichuan-client", "QUESTION=你好 'a' \"b\"", "ARGS=--max_tokens 4")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.endswith("\n")
    state = json.loads((checkout / "logs" / "baichuan-serve.json").read_text())
    os.killpg(state["pid"], signal.SIGKILL)
    until(lambda: "failed" in served("status", "STEP=baichuan-serve").stdout)
    again = served("baichuan-serve", BG="1")  # the state of the killed one is in nobody's way, nor is its port
    assert again.returncode == 0, again.stderr
    stopped = served("stop", "STEP=baichuan-serve")  # while it loads
    assert stopped.returncode == 0, stopped.stderr
    state = json.loads((checkout / "logs" / "baichuan-serve.json").read_text())
    assert state["exit_status"] == 0 and "Traceback" not in (checkout / "logs" / "baichuan-serve.log").read_text()


def test_vllm_gets_model_address_and_key(tmp_path, tiny_qwen):
    """ENGINE=vllm without UPSTREAM_URL becomes `vllm serve`; here a program of that name that tells what it got."""
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "key=$VLLM_API_KEY"\n')
    fake.chmod(0o755)
    python = str(Path(REPOSITORY / ".venv" / "bin" / "python"))
    command = [python, "-m", "llm_code.service.server", "--engine", "vllm", "--model_name_or_path", str(tiny_qwen)]
    command += ["--served_model_name", "psy", "--port", "10820", "--context", "2048", "--max_batch", "32"]
    command += ["--load_in_4bit", "--dtype", "float16", "--model_alias", "other"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "API_KEY": "a-key-of-ours"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    expected = f"serve {tiny_qwen} --host 127.0.0.1 --port 10820 --served-model-name psy other --dtype float16"
    expected += " --max-model-len 2048 --max-num-seqs 32 --quantization bitsandbytes key=a-key-of-ours"
    assert done.returncode == 0 and done.stdout.split() == expected.split()
    assert "a-key-of-ours" not in done.stderr


def test_a_dry_run_of_both_targets(served):
    serve = served("baichuan-serve", "DRY_RUN=1", "ENGINE=vllm", "UPSTREAM_URL=http://127.0.0.1:8000/v1").stdout
    assert "--engine vllm" in serve and "--upstream_url http://127.0.0.1:8000/v1" in serve and "a-key" not in serve
    client = served("baichuan-client", "DRY_RUN=1", "FILE=my questions.txt").stdout
    assert "--file 'my questions.txt'" in client and "a-key" not in client
