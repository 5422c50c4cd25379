"""finetune.launch around a launcher of bad manners: it dies of a signal at once and answers 1 for every failure."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Two ranks; dies of a signal at once, leaving them behind, as deepspeed's launcher does. torchrun gives each a session.
LAUNCHER = """
import os, subprocess, sys
ranks = []
for rank in "01":
    variables = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    ranks.append(subprocess.Popen([sys.executable, *sys.argv[1:]], env=variables, start_new_session=SESSIONS))
sys.exit(int(any([rank.wait() for rank in ranks])))
"""

RANK = """
import os, signal, sys, time
from pathlib import Path
from finetune.errors import UserError
from finetune.launch import run_rank
what, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
received = []

def wait():
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    (folder / f"up-{rank}-{os.getpid()}").touch()
    while not received:
        time.sleep(0.02)
    time.sleep(0.3)
    (folder / f"saved-{rank}").touch()
    return 128 + received[0]

def save_slowly():
    time.sleep = lambda seconds, sleep=time.sleep: sleep(2 if seconds == 0.3 else seconds)
    return wait()

def refuse():
    raise UserError("the same words from every rank")

def go_on():
    (folder / f"up-{rank}-{os.getpid()}").touch()
    while True:
        time.sleep(1)

def refuse_alone():
    if rank == "0":
        raise UserError("only here")
    # Only notes it, as a training does, which waits for the other rank.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    go_on()

def load_beside_one_that_waits():
    if rank == "1":
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    go_on()

def fail_after_the_other():
    if rank == "0":
        raise UserError("only here")
    time.sleep(0.3)
    raise RuntimeError("the other is gone")

def load():
    (folder / f"up-{rank}-{os.getpid()}").touch()
    time.sleep(60)

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def drop():
    Dropped()
    time.sleep(60)

def crash():
    if rank == "0":
        raise RuntimeError("a bug")

done = lambda: 0
run_rank(globals()[what])
"""


def start(folder: Path, what: str, patience: float = 20, sessions: bool = False) -> subprocess.Popen:
    (folder / "launcher.py").write_text(LAUNCHER.replace("SESSIONS", str(sessions)))
    (folder / "rank.py").write_text(RANK)
    settings = f"launch.OTHER_RANKS_SECONDS = {patience}; launch.ORPHAN_GRACE_SECONDS = 1"
    # A test run started with `&` has SIGINT ignored, and its children with it.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from finetune import launch; "
    code += f"{settings}; launch.run_main(launch.main)"
    ranks = [str(folder / "rank.py"), what, str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, str(folder / "launcher.py"), *ranks],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_up(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := list(folder.glob("up-*"))) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(path.name.rpartition("-")[2]) for path in found]


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_reaches_the_ranks_which_save_and_leave(tmp_path: Path, number: int, status: int) -> None:
    process = start(tmp_path, "wait")
    ranks = ranks_up(tmp_path, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert not any(map(is_alive, ranks))


def test_a_signal_while_a_model_is_loading_ends_it_without_a_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "load")
    ranks = ranks_up(tmp_path, 2)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, "")
    assert not any(map(is_alive, ranks))


def test_a_ctrl_c_inside_a_del_is_not_lost(tmp_path: Path) -> None:
    """There Python drops exceptions, a KeyboardInterrupt too, and goes on."""
    process = start(tmp_path, "drop")
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_an_error_of_all_ranks_is_printed_once_and_gives_2(tmp_path: Path) -> None:
    process = start(tmp_path, "refuse")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors == "error: the same words from every rank\n"


@pytest.mark.parametrize("sessions", [False, True])
def test_ranks_that_wait_for_a_failed_one_are_ended(tmp_path: Path, sessions: bool) -> None:
    process = start(tmp_path, "refuse_alone", patience=0.5, sessions=sessions)
    (other,) = ranks_up(tmp_path, 1)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2  # not 137: the other was killed by the launcher, not by the system
    assert errors == "error: only here\n"
    assert not is_alive(other)


def test_ranks_that_wait_for_a_killed_one_are_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "load_beside_one_that_waits", sessions=True)
    ranks = ranks_up(tmp_path, 2)
    first = next(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("up-0-*"))
    os.kill(first, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 137 and errors.startswith("rank 0 was killed") and errors.count("\n") == 1
    assert not any(map(is_alive, ranks))


def test_a_stop_while_one_rank_loads_and_the_other_waits_for_it(tmp_path: Path) -> None:
    process = start(tmp_path, "load_beside_one_that_waits", patience=0.5, sessions=True)
    ranks = ranks_up(tmp_path, 2)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, "")
    assert not any(map(is_alive, ranks))


@pytest.mark.parametrize("sessions", [False, True])
def test_ranks_save_in_their_own_time_when_the_launcher_alone_is_killed(tmp_path: Path, sessions: bool) -> None:
    process = start(tmp_path, "save_slowly", sessions=sessions)  # longer than orphans are given here
    ranks = ranks_up(tmp_path, 2)
    launcher = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, "")
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_what_was_explained_stands_over_what_followed(tmp_path: Path) -> None:
    process = start(tmp_path, "fail_after_the_other")
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, "error: only here\n")


def test_ctrl_c_before_there_are_ranks_ends_a_launcher_that_drops_it(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(signal.SIGINT, lambda *_: None); open('up', 'w'); time.sleep(60)"
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from finetune import launch; "
    code += "launch.run_main(launch.main)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", program], cwd=tmp_path, env=environment
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_a_bug_keeps_its_traceback_and_the_launchers_status(tmp_path: Path) -> None:
    process = start(tmp_path, "crash")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.count("RuntimeError: a bug") == 1


def test_success_is_0_and_a_missing_launcher_is_explained(tmp_path: Path) -> None:
    assert start(tmp_path, "done").wait(timeout=30) == 0
    command = [sys.executable, "-m", "finetune.launch", "no-such-launcher"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert "cannot run no-such-launcher" in result.stderr


def test_killing_it_outright_ends_the_launcher_too(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    launchers = {
        int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks_up(tmp_path, 2)
    }
    process.kill()
    process.wait()
    process.stderr.close()  # its ranks have it still
    deadline = time.monotonic() + 10
    while any(map(is_alive, launchers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [launcher for launcher in launchers if is_alive(launcher)]
    for path in tmp_path.glob("up-*"):
        os.kill(int(path.name.rpartition("-")[2]), signal.SIGKILL)
    assert not left
