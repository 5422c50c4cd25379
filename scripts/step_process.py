"""The processes of one step: start them, pass signals on to all of them, wait until the last one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Callable

from scripts.step_state import MARK, StepError, StepState, processes_of

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# Ranks that outlive their launcher: after a stop they may still be saving, after a crash they only hang.
SECONDS_AFTER_STOP, SECONDS_AFTER_END = 600, 30


def run_and_wait(
    name: str,
    command: list[str],
    variables: dict[str, str],
    started: Callable[[int, str], None] = lambda pid, mark: None,
) -> tuple[int, int | None]:
    """Run the command in a session of its own. Returns its status as a shell gives it, and the signal it was sent.

    In its own session the step gets Ctrl-C once, from here, and not a second time from the terminal.
    `started` is told the pid and the mark of the step's processes.
    """
    mark = f"{name}-{os.getpid()}-{time.time_ns()}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {signal.SIGCHLD})
    try:
        process = subprocess.Popen(
            command,
            env={**variables, MARK: mark},
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before),
        )
        started(process.pid, mark)
        received = _pass_signals_on(process)
        _wait_for_the_rest(name, mark, SECONDS_AFTER_STOP if received else SECONDS_AFTER_END)
    except OSError as error:
        raise StepError(f"{name}: cannot run {command[0]}: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, received


def _pass_signals_on(process: subprocess.Popen) -> int | None:
    """Wait for the end of the process; its group gets every signal that arrives here."""
    received = None
    while process.poll() is None:
        number = signal.sigwait(SIGNALS | {signal.SIGCHLD})
        if number != signal.SIGCHLD:
            received = number
            os.killpg(process.pid, number)
    return received


def _wait_for_the_rest(name: str, mark: str, seconds: float) -> None:
    """Let processes that outlive the first one end by themselves, and kill them when the time is up."""
    deadline = time.monotonic() + seconds
    told = False
    while True:
        alive = processes_of(mark)
        if not alive:
            return
        if not told and time.monotonic() > deadline - seconds + 1:
            print(f"{name}: waiting up to {seconds} s for processes {alive}", file=sys.stderr, flush=True)
            told = True
        late = time.monotonic() > deadline
        number = signal.SIGKILL if late else signal.sigtimedwait(SIGNALS, 0.1)
        if number is not None:
            send(alive, number if late else number.si_signo)


def send(pids: list[int], number: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def supervise(state: StepState, command: list[str]) -> int:
    """Run a detached step and keep its record: running, then finished, failed or stopped."""
    record = {"step": state.name, "command": command, "status": "running", "started": time.time()}
    record.update(supervisor=os.getpid(), pid=None, mark="", price_per_hour=_price_per_hour())

    def started(pid: int, mark: str) -> None:
        record.update(pid=pid, mark=mark)
        state.write(record)

    state.write(record)
    try:
        status, received = run_and_wait(state.name, command, dict(os.environ), started)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        status, received = 2, None
    word = "finished" if status == 0 else "stopped" if received else "failed"
    record.update(status=word, exit_status=status, seconds=time.time() - record["started"])
    state.write(record)
    return status


def _price_per_hour() -> float:
    try:
        return float(os.environ.get("PRICE_PER_HOUR") or 0)
    except ValueError:
        print(f"PRICE_PER_HOUR is no number: {os.environ['PRICE_PER_HOUR']}; no cost is shown", file=sys.stderr)
        return 0
