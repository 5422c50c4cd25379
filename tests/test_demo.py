"""The demo on the engine: its replies, what it says of errors, then the program in a pipe and on a pseudo-terminal."""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from llm_code.llm_demo.baichuan2_demo import make_chat
from llm_code.module_interface.interface import Event, QueueFull, SamplingParams
from tests.terminal import Terminal, without_end


class FakeEngine:
    """Says two words, or fails; notes what was submitted and cancelled."""

    limits = SimpleNamespace(context=50)

    def __init__(self, error=None):
        self.error, self.submitted, self.cancelled = error, [], 0

    def encode_chat(self, messages):
        return [1] * sum(len(message["content"]) for message in messages)

    def submit(self, ids, params):
        if self.error and not self.submitted:
            self.submitted.append(ids)
            raise self.error
        self.submitted.append((ids, params))
        request = iter([Event("你"), Event("", tokens=()), Event("好", finish_reason="stop")])
        return FakeRequest(request, self)


class FakeRequest:
    def __init__(self, events, engine):
        self.events, self.engine = events, engine

    def __iter__(self):
        return self.events

    def cancel(self):
        self.engine.cancelled += 1


def test_a_reply_and_its_settings():
    engine, params = FakeEngine(), SamplingParams(max_tokens=10, temperature=0.5)
    chat = make_chat(engine, params)
    assert chat.room == 40
    assert list(chat.ask("问题")) == ["你", "好"]
    list(chat.ask("x"))
    assert engine.submitted == [([1, 1], params), ([1] * 5, params)]


def test_leaving_a_reply_cancels_it():
    engine = FakeEngine()
    chat = make_chat(engine, SamplingParams(max_tokens=10))
    reply = chat.ask("问题")
    assert next(reply) == "你" and engine.cancelled == 0
    reply.close()
    assert engine.cancelled == 1 and chat.history[-1] == {"role": "assistant", "content": "你"}


def test_errors_of_the_engine_are_told_and_the_conversation_goes_on():
    chat = make_chat(FakeEngine(QueueFull("8 requests wait")), SamplingParams(max_tokens=10))
    with pytest.raises(UserError, match="8 requests wait"):
        list(chat.ask("问题"))
    assert chat.history == []
    assert list(chat.ask("问题")) == ["你", "好"]


def test_a_reply_as_long_as_the_context_is_refused():
    with pytest.raises(UserError, match="leaves no room in a context of 50"):
        make_chat(FakeEngine(), SamplingParams(max_tokens=50))


def test_the_target_loads_the_model_of_the_settings(make):
    places = {"ENVS_DIR": "/envs", "LLM_MODULE_MODEL_PATH": "/my final"}
    done = make("baichuan-demo", "DRY_RUN=1", "ARGS=--seed 7", environment=places)
    expected = ["--model_name_or_path", "/my final", "--engine", "local", "--seed", "7"]
    assert shlex.split(done.stdout)[-6:] == expected, done.stderr


@pytest.fixture(scope="module")
def endless_baichuan(tiny_baichuan, tmp_path_factory):
    config = json.loads((tiny_baichuan / "config.json").read_text())
    assert config["model_type"] == "llama"
    return without_end(tiny_baichuan, tmp_path_factory.mktemp("demo") / "model", config["vocab_size"] - 1, "<unk>")


def command(folder, *arguments):
    module = "llm_code.llm_demo.baichuan2_demo"
    return [sys.executable, "-m", module, "--model_name_or_path", str(folder), "--dtype", "float32", *arguments]


def test_one_reply_a_line_through_a_pipe(endless_baichuan, tmp_path):
    saved = tmp_path / "rows.jsonl"
    lines = f"你好\n/system 你是医生\n你好\n/save {saved}\n/reset\n你好\n/exit\n再问\n"
    done = subprocess.run(
        command(endless_baichuan, "--temperature", "0", "--max_new_tokens", "6"),
        input=lines.encode(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    replies = done.stdout.decode().splitlines()
    assert len(replies) == 3 and replies[1] == replies[2], "/reset keeps the system text; nothing after /exit"
    row = json.loads(saved.read_text(encoding="utf-8"))
    told = [("system", "你是医生"), ("user", "你好"), ("assistant", replies[1])]
    assert [(message["role"], message["content"]) for message in row["messages"]] == told


def test_ctrl_c_stops_the_reply_and_not_the_program(endless_baichuan):
    terminal = Terminal(command(endless_baichuan, "--temperature", "0", "--max_new_tokens", "3900"))
    terminal.wait_for("/help lists the commands.")
    terminal.wait_for("> ")
    terminal.type("你好\n")
    terminal.wait_for("\n")  # the echoed question
    terminal.wait_for_more(5)
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("the conversation starts anew")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_a_missing_model_is_told(tmp_path):
    done = subprocess.run(command(tmp_path / "none"), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
