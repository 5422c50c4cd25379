"""The terminal chat: its conversation logic alone, then the real program in a pipe and on a pseudo-terminal."""

import os
import subprocess
import sys

import pytest

from finetune.errors import UserError
from finetune.rows import read_rows
from finetune.terminal import Chat, fit_history, print_reply
from tests.terminal import Terminal, without_end

WORDS = {"encode": lambda messages: [1] * sum(len(m["content"]) for m in messages)}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("room", "system", "dropped"),
    [(100, None, 0), (9, None, 0), (8, None, 2), (5, None, 2), (4, None, 4), (1, None, 4), (8, "s", 2), (5, "s", 4)],
)
def test_the_oldest_turns_go_first(room, system, dropped):
    history = turns("aa", "bb", "cc", "dd", "e")  # 9 tokens with one token a letter
    assert fit_history(history, system, lambda m: sum(len(x["content"]) for x in m), room) == dropped


def test_a_conversation_remembers_and_forgets(capsys):
    asked = []

    def answer(ids):
        asked.append(len(ids))
        yield from ("re", "ply")

    chat = Chat(**WORDS, answer=answer, room=20)
    assert list(chat.ask("four")) == ["re", "ply"]
    assert list(chat.ask("x")) == ["re", "ply"]
    assert asked == [4, 4 + 5 + 1]
    assert chat.command("/system Be kind.") and chat.system == "Be kind." and chat.history == []
    list(chat.ask("x"))
    assert asked[-1] == len("Be kind.x")
    assert chat.command("/system") and chat.system is None
    assert chat.command("/help") and "/reset" in capsys.readouterr().err
    assert not chat.command("/exit")


def test_dropped_turns_are_announced_and_a_long_question_is_refused(capsys):
    chat = Chat(**WORDS, answer=lambda ids: (piece for piece in ["12345"]), room=10)
    list(chat.ask("abcde"))
    list(chat.ask("abc"))
    assert "oldest 1 turns were dropped" in capsys.readouterr().err
    assert [m["content"] for m in chat.history] == ["abc", "12345"]
    with pytest.raises(UserError, match="11 tokens, 10 fit"):
        list(chat.ask("a" * 11))
    assert [m["content"] for m in chat.history] == ["abc", "12345"], "a refused question leaves no trace"


def test_an_interrupted_reply_enters_the_history_as_far_as_it_was_said(capsys):
    def answer(ids):
        yield "half"
        raise KeyboardInterrupt

    chat = Chat(**WORDS, answer=answer, room=100)
    print_reply(chat.ask("question"))
    assert chat.history == turns("question", "half")
    assert capsys.readouterr().out == "half\n"


def test_a_reply_interrupted_before_its_first_word_leaves_no_trace():
    def answer(ids):
        raise KeyboardInterrupt
        yield

    chat = Chat(**WORDS, answer=answer, room=100)
    print_reply(chat.ask("question"))
    assert chat.history == []


def test_a_saved_conversation_is_a_training_row(tmp_path, capsys):
    chat = Chat(**WORDS, answer=lambda ids: (piece for piece in ["好", "的"]), room=100)
    assert chat.command("/save") and "no conversation" in capsys.readouterr().err
    chat.command("/system 你是医生")
    list(chat.ask("你好"))
    for _ in range(2):
        chat.command(f"/save {tmp_path / 'chats.jsonl'}")
    rows = read_rows(tmp_path / "chats.jsonl")
    assert [row.messages() for row in rows] == [chat.messages()] * 2


def test_a_reply_without_a_word_is_not_saved(tmp_path, capsys):
    """No row may have an empty reply; alone, it is no conversation."""
    chat = Chat(**WORDS, answer=lambda ids: iter(()), room=100, system="你是医生")
    chat.history = turns("silent", " \n")
    chat.command(f"/save {tmp_path / 'chats.jsonl'}")
    assert "no conversation" in capsys.readouterr().err and not (tmp_path / "chats.jsonl").exists()
    chat.history += turns("question", "answer", "silent", "")
    chat.command(f"/save {tmp_path / 'chats.jsonl'}")
    told = [{"role": "system", "content": "你是医生"}, *turns("question", "answer")]
    assert [row.messages() for row in read_rows(tmp_path / "chats.jsonl")] == [told]
    assert len(chat.history) == 6


@pytest.mark.parametrize("name", ["", "/", "~nobody-of-that-name/x", "~x.jsonl", "a\0b"])
def test_a_conversation_that_cannot_be_saved_goes_on(tmp_path, capsys, name):
    chat = Chat(**WORDS, answer=lambda ids: iter(()), room=100)
    chat.history = turns("question", "answer")
    assert chat.command(f"/save {name or tmp_path}")
    told = capsys.readouterr().err
    assert "cannot be written: " in told and "None" not in told and chat.history == turns("question", "answer")
    chat.history = turns("question", "\udcff")  # a byte of the terminal that was no UTF-8
    assert "cannot be written: " in chat.save(str(tmp_path / "chats.jsonl"))


@pytest.fixture(scope="module")
def endless_qwen(tiny_qwen, tmp_path_factory):
    return without_end(tiny_qwen, tmp_path_factory.mktemp("chat") / "model", 2276, "<|extra_204|>")


def command(folder, *arguments):
    return [sys.executable, "-m", "finetune.chat", "--model_name_or_path", str(folder), *arguments]


def test_one_reply_a_line_through_a_pipe(endless_qwen):
    lines = "你好\n/system 你是医生\n你好\n/reset\n\n你好\n".encode() + b"\xff\n"
    done = subprocess.run(
        command(endless_qwen, "--temperature", "0", "--max_new_tokens", "6"),
        input=lines,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    replies = done.stdout.decode().splitlines()
    assert len(replies) == 4 and all(replies)
    assert replies[1] == replies[2], "/reset keeps the system text"
    assert replies[0] != replies[1]


def test_a_context_beyond_the_models_is_refused(endless_qwen):
    done = subprocess.run(command(endless_qwen, "--context", "100000"), input="", capture_output=True, text=True)
    assert done.returncode == 2 and "error: --context 100000: the model has 2048 positions" in done.stderr


def test_a_terminal_in_gbk_spoils_its_line_alone(endless_qwen, monkeypatch):
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.delenv("LC_ALL", raising=False)
    terminal = Terminal(command(endless_qwen, "--max_new_tokens", "6"))
    terminal.wait_for("> ")
    os.write(terminal.fd, "你好\n".encode("gbk"))
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.status() == 0


def test_ctrl_c_stops_the_reply_and_not_the_program(endless_qwen):
    terminal = Terminal(command(endless_qwen, "--max_new_tokens", "1900", "--temperature", "0"))
    terminal.wait_for("/help lists the commands.")
    terminal.wait_for("> ")
    terminal.type("你好\n")
    terminal.wait_for("\n")  # the echoed question
    terminal.wait_for_more(5)  # the reply has begun
    terminal.type("\x03")
    assert terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/system 你是医生\n")
    terminal.wait_for("system text: 你是医生")
    terminal.wait_for("> ")
    terminal.interrupt_until("(/exit or Ctrl-D leaves)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.status() == 0
