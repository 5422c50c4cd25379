"""What is known of a detached step: logs/STEP.log, logs/STEP.json, and whether it lives.

A step lives as long as its supervisor holds the lock logs/STEP.lock: the kernel drops the lock with the process, so
neither a zombie nor a reused pid can pass for a running step. A step in front that writes results holds the same lock,
with its pid in the file: it keeps a second run away, but has no record and no log that could be watched.

The processes of a step are found by the mark RUN_STEP_ID in their environment, which also finds those that left the
session; a zombie has no environment and is not counted.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "RUN_STEP_ID"
# What every record has from its first writing on.
KEYS = {"step", "command", "status", "started", "supervisor", "pid", "mark", "price_per_hour"}


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
        record = self._load()
        if record["status"] == "running" and not self.is_running():
            record = self._load()
            if record["status"] == "running":  # read again: it may have ended in between
                record["status"] = "lost"
        if record["status"] == "running":
            record["seconds"] = time.time() - record["started"]
        return record

    def _load(self) -> dict:
        """The record as it lies there. Raises StepError for a file that is none: cut short by a power failure, say."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            if KEYS <= set(record):
                return record
        except (ValueError, TypeError):
            pass
        raise StepError(f"logs/{self._record.name} is no record of a step. Remove it: rm logs/{self._record.name}")

    def write(self, record: dict) -> None:
        """Replace the record in one piece, so that no reader sees half of it."""
        unfinished = self._record.with_suffix(".json.new")
        unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
        unfinished.replace(self._record)

    def is_running(self) -> bool:
        """Whether a detached run holds the lock."""
        return self._is_locked() and not self._lock.read_text()

    def pid_in_front(self) -> str:
        """The pid of the run in front that holds the lock; empty without one."""
        return self._lock.read_text() if self._is_locked() else ""

    def _is_locked(self) -> bool:
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
        if not self._record.exists():
            return False
        try:
            record = self.read()
        except StepError:  # nothing is known of the run before, and the next one writes a new record
            return False
        return record["status"] == "lost" and bool(processes_of(record["mark"]))

    def acquire(self, in_front: bool = False) -> int | None:
        """The descriptor that holds the lock, for the supervisor to inherit; None while another run has it."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(5):  # a reader of is_running() may hold the shared lock for a moment
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            os.ftruncate(descriptor, 0)
            if in_front:
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)
        return None

    def new_log(self) -> int:
        """A descriptor of an empty log; the one before is kept as STEP.log.1."""
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def known_steps(folder: Path = ROOT / "logs") -> list[StepState]:
    """Every step that was ever detached, the newest start first; a file that is no record is skipped with a remark."""
    started = []
    for path in folder.glob("*.json"):
        step = StepState(path.stem, folder)
        try:
            started.append((step.read()["started"], step))
        except StepError as error:
            print(f"Skipped: {error}", file=sys.stderr)
    return [step for _, step in sorted(started, key=lambda pair: pair[0], reverse=True)]


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
