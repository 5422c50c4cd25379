"""Run a launcher of several ranks (torchrun, deepspeed) so that signals and exit statuses mean what they should.

    python -m finetune.launch torchrun --standalone --nproc_per_node 2 -m qwen_qlora.train_qlora --train_args_file ...

Launchers do two things badly: torchrun kills its ranks 30 seconds after a SIGTERM, less than an update and a
checkpoint of a large model may take, and deepspeed's launcher leaves them behind; and both answer 1 whatever a rank's
exit status was. So the launcher runs in a session of its own, SIGTERM and SIGINT go to the ranks alone, which finish
their update, save and leave; nothing of the launcher's session outlives this process; and the status the ranks noted
is the one given back: 143 or 130 after a signal, 2 for an error that was explained, else the launcher's own. Standard
library only.
"""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune.errors import UserError, run_main

STATUS_DIR = "FINETUNE_STATUS_DIR"
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
ORPHAN_GRACE_SECONDS = 5.0
OTHER_RANKS_SECONDS = 20.0
PR_SET_PDEATHSIG = 1


# ---- inside a rank ----


def run_rank(main: Callable[[], int | None]) -> NoReturn:
    """run_main for a program that may be one rank of several: an error of all is printed once, the status noted."""
    # Until training begins there is nothing to save: leave at once, but as one who was asked to.
    signal.signal(signal.SIGTERM, _leave)
    try:
        run_main(lambda: _print_once(main))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    folder = os.environ.get(STATUS_DIR)
    if folder and status:
        (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(str(status))
        # With another status than 0 launchers add a report of their own to what is explained already. Ranks that should
        # wait for this one in vain are ended by run_launcher.
        if status in (*STOPPED, 2):
            status = 0
    sys.stdout.flush()
    sys.exit(status)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


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


def _in_session(session: int) -> list[int]:
    found = []
    for process in _processes():
        try:
            if os.getsid(process) == session:
                found.append(process)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def _end_session(session: int) -> None:
    """Leave nothing of the launcher's session behind."""
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    number = signal.SIGTERM
    while left := _in_session(session):
        _send(left, number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.2)


def _die_with_parent() -> None:
    """If this process is killed outright, the launcher gets SIGTERM and passes it on (Linux)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        pass


def _noted_status(folder: Path) -> int | None:
    statuses = sorted(int(path.read_text()) for path in folder.glob("rank-*"))
    return statuses[0] if statuses else None


def _wait(launcher: subprocess.Popen, folder: Path) -> int:
    """Status of the launcher; it is not waited for much longer than for the first rank that left with an error."""
    deadline = None
    while True:
        try:
            return launcher.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if deadline is None and _noted_status(folder) not in (None, *STOPPED):
                deadline = time.monotonic() + OTHER_RANKS_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                _end_session(launcher.pid)


def run_launcher(command: list[str]) -> int:
    """Run the launcher to its end and return the status to leave with."""
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="finetune-launch-") as folder:
        try:
            launcher = subprocess.Popen(
                command,
                env={**os.environ, STATUS_DIR: folder},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise UserError(f"cannot run {command[0]}: {error.strerror}. Is its environment first on PATH?") from None

        def forward(number: int, frame: FrameType | None) -> None:
            # A terminal that went away asks for the same as SIGTERM.
            number = signal.SIGTERM if number == signal.SIGHUP else number
            received.append(number)
            # Before the ranks exist there is nothing to save: the launcher itself is ended.
            _send(find_ranks(launcher.pid) or [launcher.pid], number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, a shell's `&` SIGINT
                signal.signal(number, forward)
        status = _wait(launcher, Path(folder))
        _end_session(launcher.pid)
        noted = _noted_status(Path(folder))
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
    return run_launcher(command)


if __name__ == "__main__":
    run_main(main)
