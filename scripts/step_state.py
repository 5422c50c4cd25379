"""What is known of a detached step: logs/STEP.log, logs/STEP.json, and whether it lives.

A step lives as long as its supervisor holds the lock logs/STEP.lock: the kernel drops the lock with the process, so
neither a zombie nor a reused pid can pass for a running step. Its processes are found by the mark RUN_STEP_ID in their
environment, which also finds those that left the session; a zombie has no environment and is not counted.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "RUN_STEP_ID"


class StepError(ValueError):
    """A step that cannot be run or found; the text says what to do."""


class StepState:
    """The files of one step below `folder`."""

    def __init__(self, name: str, folder: Path = ROOT / "logs") -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._record = folder / f"{name}.json"
        self._lock = folder / f"{name}.lock"

    def read(self) -> dict:
        """The record of the newest run; a running step whose supervisor was killed has the status `lost`."""
        record = json.loads(self._record.read_text(encoding="utf-8"))
        if record["status"] == "running" and not self.is_running():
            record = json.loads(self._record.read_text(encoding="utf-8"))
            if record["status"] == "running":  # read again: it may have ended in between
                record["status"] = "lost"
        if record["status"] == "running":
            record["seconds"] = time.time() - record["started"]
        return record

    def write(self, record: dict) -> None:
        """Replace the record in one piece, so that no reader sees half of it."""
        unfinished = self._record.with_suffix(".json.new")
        unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
        unfinished.replace(self._record)

    def is_running(self) -> bool:
        if not self._lock.exists():
            return False
        with open(self._lock) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def has_processes(self) -> bool:
        """Whether the step runs, or processes of it were left by a supervisor that was killed."""
        if self.is_running():
            return True
        return self._record.exists() and self.read()["status"] == "lost" and bool(processes_of(self.read()["mark"]))

    def acquire(self) -> int | None:
        """The descriptor that holds the lock, for the supervisor to inherit; None while another run has it."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(5):  # a reader of is_running() may hold the shared lock for a moment
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                time.sleep(0.05)
        os.close(descriptor)
        return None

    def new_log(self) -> int:
        """A descriptor of an empty log; the one before is kept as STEP.log.1."""
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def known_steps(folder: Path = ROOT / "logs") -> list[StepState]:
    """Every step that was ever detached, the newest start first."""
    steps = [StepState(path.stem, folder) for path in folder.glob("*.json")]
    return sorted(steps, key=lambda step: step.read()["started"], reverse=True)


def processes_of(mark: str) -> list[int]:
    """The living processes that carry this mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # another user's process, or one that ended just now
            continue
    return found


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log; of a progress bar that redraws itself only the newest state."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=False) if path.exists() else []
    return [line for line in lines if line.strip()][-count:]
