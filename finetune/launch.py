"""Run a launcher of several ranks (torchrun, deepspeed) so that signals and exit statuses mean what they should.

    python -m finetune.launch torchrun --standalone --nproc_per_node 2 -m qwen_qlora.train_qlora --train_args_file ...

Launchers do two things badly: torchrun kills its ranks 30 seconds after a SIGTERM, less than an update and a
checkpoint of a large model may take, and deepspeed's launcher leaves them behind; and both answer 1 whatever a rank's
exit status was. So the launcher runs in a session of its own, SIGTERM and SIGINT go to the ranks alone, which finish
their update, save and leave; a rank that was killed ends the others within seconds; nothing of the launcher's session
outlives this process, nor the shared memory its ranks talked through; and the status the ranks noted is the one given
back: 143 or 130 after a signal, 2 for an error that was explained, 137 for a killed rank, else the launcher's own.
With --until_eof (finetune.hosts) the words TERM, INT and KILL on its input mean what the signals do, and so does the
input's end. Standard library only.
"""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune.errors import UserError, run_main

STATUS_DIR = "FINETUNE_STATUS_DIR"
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
KILLED = 128 + signal.SIGKILL
ORPHAN_GRACE_SECONDS = 5.0
OTHER_RANKS_SECONDS = 20.0
KILLED_RANK_SECONDS = 3.0  # its last words and the others' come first
SHARED_MEMORY = Path("/dev/shm")
PR_SET_PDEATHSIG = 1


# ---- inside a rank ----


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """run_main for a program that may be one rank of several: an error of all is printed once, the status noted."""
    # Until training begins there is nothing to save: leave at once, but as one who was asked to.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's `&` ignores SIGINT
            signal.signal(number, _leave)
    _note("started", " ".join([str(os.getpid()), *map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT"), ("-", "-"))]))
    threading.Thread(target=_follow_launcher, daemon=True).start()
    try:
        run_main(lambda: _print_once(main))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except BaseException:
        if _explained_elsewhere():
            os._exit(_noted(2))  # a connection that is lost is what follows
        _note("ended", "1")
        raise
    sys.stdout.flush()
    sys.exit(_noted(status))


def _explained_elsewhere() -> bool:
    """Whether another rank has left with an error that it explained."""
    folder = os.environ.get(STATUS_DIR)
    return folder is not None and any(path.read_text() == "2" for path in Path(folder).glob("ended-*"))


def _noted(status: int) -> int:
    """Note how this rank ends; returns the status to leave with.

    With another status than 0 launchers add a report of their own to what is explained already. Ranks that should
    wait for this one in vain are ended by run_launcher.
    """
    _note("ended", str(status))
    return 0 if os.environ.get(STATUS_DIR) and status in (*STOPPED, 2) else status


def _note(what: str, text: str) -> None:
    """Leave a note about this rank for run_launcher; written aside, so that it is read whole."""
    folder, rank = os.environ.get(STATUS_DIR), os.environ.get("RANK", "0")
    if folder and Path(folder).is_dir():
        written = Path(folder) / f".{what}-{rank}"
        written.write_text(text)
        written.rename(Path(folder) / f"{what}-{rank}")


def _follow_launcher() -> None:
    """Stop as after SIGTERM when run_launcher is killed outright: deepspeed's launcher would not pass it on."""
    folder = os.environ.get(STATUS_DIR)
    if folder is None:
        return
    try:
        launcher = int((Path(folder) / "launcher").read_text())
    except OSError:
        return
    while _is_alive(launcher):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Leave at once: an exception, raised while modules are imported, may fall into a __del__ and be dropped there."""
    if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"interrupted\n")  # a print may be going on
    os._exit(_noted(128 + number))


def _print_once(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except UserError as error:
        folder = os.environ.get(STATUS_DIR)
        if folder is None:
            raise
        mark = Path(folder) / hashlib.sha256(str(error).encode()).hexdigest()
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return 2
        raise


# ---- around the launcher ----


def _processes() -> dict[int, int]:
    """{process: its parent} of everything running."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    return parents


def _is_rank(process: int) -> bool:
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return False


def find_ranks(launcher: int) -> list[int]:
    """The rank processes below a launcher: those whose environment has LOCAL_RANK and whose parent's has not."""
    parents = _processes()
    below, frontier = set(), {launcher}
    while frontier:
        frontier = {process for process, parent in parents.items() if parent in frontier} - below
        below |= frontier
    return [process for process in below if _is_rank(process) and not _is_rank(parents[process])]


def _send(processes: list[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _left(launcher: int, folder: Path) -> list[int]:
    """What is still there of the launcher's session, and ranks: torchrun puts each into a session of its own."""
    found = []
    mark = f"\0{STATUS_DIR}={folder}\0".encode()
    for process in _processes():
        try:
            environment = b"\0" + Path(f"/proc/{process}/environ").read_bytes()
            if os.getsid(process) == launcher or mark in environment:
                found.append(process)
        except OSError:
            continue
    return found


def _end_session(launcher: int, folder: Path) -> None:
    """Leave nothing of the launcher behind. It goes first: it would report at length what is explained already."""
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    number = signal.SIGTERM
    while left := _left(launcher, folder):
        _send([process for process in left if process == launcher], signal.SIGKILL)
        _send([process for process in left if process != launcher], number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.2)


def _let_ranks_save(launcher: int, folder: Path) -> None:
    """The launcher alone was killed: ranks that follow it stop as after SIGTERM, in the time that saving takes."""
    told: set[int] = set()
    while _noted_status(folder) is None and not _killed_rank(folder):
        ranks = {process for process in _left(launcher, folder) if _is_rank(process)}
        if not ranks:
            return
        _send(sorted(ranks - told), signal.SIGTERM)
        told |= ranks
        time.sleep(0.2)


def die_with_parent() -> None:
    """In a child: get SIGTERM when the parent is killed outright (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        pass


def _noted_status(folder: Path) -> int | None:
    """Least status but 0 that a rank noted, None while there is none; what was explained stands over what followed."""
    noted = {status for path in folder.glob("ended-*") if (status := int(path.read_text()))}
    return 2 if 2 in noted else min(noted, default=None)


def _killed_rank(folder: Path) -> str | None:
    """Number of a rank that began, is gone and noted no end."""
    for path in folder.glob("started-*"):
        rank = path.name.partition("-")[2]
        if not _is_alive(int(path.read_text().split()[0])) and not (folder / f"ended-{rank}").exists():
            return rank
    return None


def _clear_shared_memory(folder: Path) -> None:
    """DeepSpeed's ranks on a CPU never remove the buffers they share, named by user, address and port."""
    groups = {tuple(path.read_text().split()[1:]) for path in folder.glob("started-*")}
    for address, port in groups:
        for path in SHARED_MEMORY.glob(f"deepspeed_*_{os.getuid()}_{address}_{port}_*"):
            path.unlink(missing_ok=True)


def _wait(launcher: subprocess.Popen, folder: Path) -> int:
    """Status of the launcher; it is not waited for much longer than for the first rank that left with an error."""
    deadline = killed = None
    while True:
        try:
            status = launcher.wait(timeout=0.5)
            was_killed = killed or (deadline is None and _killed_rank(folder))  # and not by _end_session
            return KILLED if was_killed else status
        except subprocess.TimeoutExpired:
            if deadline is None and _noted_status(folder) is not None:  # who saves leaves together with the others
                deadline = time.monotonic() + OTHER_RANKS_SECONDS
            if killed is None and (killed := _killed_rank(folder)):
                _say_killed(killed)
                deadline = time.monotonic() + KILLED_RANK_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                _end_session(launcher.pid, folder)


def _say_killed(rank: str) -> None:
    print(
        f"rank {rank} was killed, perhaps for lack of main memory (look: dmesg). The others are ended; run again, "
        "training goes on from the newest checkpoint.",
        file=sys.stderr,
        flush=True,
    )


def _obey_input(launcher: int, folder: Path) -> None:
    """Signals from another machine: words, a line each; the connection's end counts as TERM."""
    for line in iter(sys.stdin.readline, ""):
        word = line.strip()
        if word == "KILL":
            _end_session(launcher, folder)
        elif word in ("TERM", "INT"):
            os.kill(os.getpid(), signal.Signals[f"SIG{word}"])
    os.kill(os.getpid(), signal.SIGTERM)


def run_launcher(command: list[str], until_eof: bool = False) -> int:
    """Run the launcher to its end and return the status to leave with."""
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="finetune-launch-") as folder:
        (Path(folder) / "launcher").write_text(str(os.getpid()))
        try:
            launcher = subprocess.Popen(
                command,
                env={**os.environ, STATUS_DIR: folder},
                stdin=subprocess.DEVNULL if until_eof else None,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise UserError(f"cannot run {command[0]}: {error.strerror}. Is its environment first on PATH?") from None

        def forward(number: int, frame: FrameType | None) -> None:
            # A terminal that went away asks for the same as SIGTERM.
            number = signal.SIGTERM if number == signal.SIGHUP else number
            received.append(number)
            if ranks := find_ranks(launcher.pid):
                _send(ranks, number)
            else:
                # Before they exist there is nothing to save: the launcher itself is ended. Not by SIGINT, which may
                # fall into one of its imports and be dropped there, or end in a traceback.
                _send([launcher.pid], signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, a shell's `&` SIGINT
                signal.signal(number, forward)
        if until_eof:
            threading.Thread(target=_obey_input, args=[launcher.pid, Path(folder)], daemon=True).start()
        status = _wait(launcher, Path(folder))
        if status < 0:
            _let_ranks_save(launcher.pid, Path(folder))
        _end_session(launcher.pid, Path(folder))
        _clear_shared_memory(Path(folder))
        noted = _noted_status(Path(folder))
    if status == KILLED:
        return status
    if noted is not None:
        return noted
    if received and status:
        return 128 + received[0]
    return 128 - status if status < 0 else status


def main() -> int:
    """Command line: everything behind the module's name is the launcher's command."""
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    until_eof = command[0] == "--until_eof"
    return run_launcher(command[until_eof:], until_eof)


if __name__ == "__main__":
    run_main(main)
