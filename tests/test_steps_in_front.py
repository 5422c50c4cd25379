"""Steps in front: which of them run once at a time, and a chat at a real terminal."""

import os
import pty
import select
import signal
import subprocess

import pytest

from tests.steps import RUN, SAVES, exists, record, run_step, wait_for


@pytest.fixture
def in_front(checkout):
    """Start a step in front and wait until it is ready; what is left of it is ended."""
    started = []

    def start(name: str) -> subprocess.Popen:
        command = [*RUN, "run", name, "--", "bash", "-c", SAVES]
        started.append(subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("name", ["qwen-train", "baichuan-finalize", "qwen-env"])
def test_a_second_run_of_a_step_that_writes_is_refused_while_one_is_in_front(checkout, in_front, name):
    first = in_front(name)
    for background in ("0", "1"):
        again = run_step(checkout, "run", name, "--", "echo", "ran", BG=background)
        assert (again.returncode, again.stdout) == (2, "")
        told = f"{name} is already running in front (pid {first.pid}). End it with Ctrl-C in its terminal"
        assert again.stderr == f"error: {told}\n"
    assert "No step was started in the background" in run_step(checkout, "status").stdout
    assert "Nothing is running" in run_step(checkout, "stop").stdout
    assert run_step(checkout, "run", "qwen-merge" if name != "qwen-merge" else "x", "--", "echo").returncode == 0
    first.terminate()
    assert first.wait() == 143
    assert run_step(checkout, "run", name, "--", "echo", "ran").stdout == "ran\n"


def test_a_run_in_front_does_not_revive_the_record_of_a_lost_one(checkout, in_front):
    run_step(checkout, "run", "qwen-train", "--", "bash", "-c", SAVES, BG="1")
    os.kill(record(checkout, "qwen-train")["supervisor"], signal.SIGKILL)
    os.killpg(record(checkout, "qwen-train")["pid"], signal.SIGKILL)
    wait_for(lambda: not exists(record(checkout, "qwen-train")["pid"]))
    first = in_front("qwen-train")
    assert " lost " in run_step(checkout, "status").stdout
    assert "Not running" in run_step(checkout, "stop", "qwen-train").stdout
    assert first.poll() is None
    first.terminate()
    first.wait()
    assert run_step(checkout, "run", "qwen-train", "--", "bash", "-c", SAVES, BG="1").returncode == 0
    assert " running " in run_step(checkout, "status").stdout
    assert "qwen-train stopped" in run_step(checkout, "stop", "qwen-train").stdout


@pytest.mark.parametrize("name", ["baichuan-client", "qwen-eval"])
def test_steps_that_ask_or_look_after_their_files_run_beside_themselves(checkout, in_front, name):
    in_front(name)
    assert run_step(checkout, "run", name, "--", "echo", "ran").stdout == "ran\n"


def test_a_chat_keeps_its_terminal_and_ctrl_c_reaches_only_its_reply(checkout):
    """Through a real terminal: make passes the keys on, and Ctrl-C arrives once, as the program's KeyboardInterrupt."""
    program = checkout / "chat.py"
    program.write_text(
        "while True:\n"
        "    try:\n"
        "        print('got', input('> '), flush=True)\n"
        "    except KeyboardInterrupt:\n"
        "        print('stopped', flush=True)\n"
        "    except EOFError:\n"
        "        break\n"
    )
    (checkout / "Makefile").write_text("chat: ; @python3 scripts/run_step.py run chat -- python3 chat.py\n")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(checkout)
        os.execvp("make", ["make", "chat"])
    seen = ""

    def shown(text: str) -> bool:
        nonlocal seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode()
        return text in seen

    for keys, answer in [("hello\n", "got hello"), ("\x03", "stopped"), ("again\n", "got again")]:
        wait_for(lambda: seen.endswith("> ") or shown("> "))
        os.write(terminal, keys.encode())
        wait_for(lambda answer=answer: shown(answer))
    assert seen.count("stopped") == 1
    os.write(terminal, b"\x04")
    os.waitpid(pid, 0)
