"""Look at detached steps and end them: status, logs, stop."""

from __future__ import annotations

import re
import shlex
import signal
import sys
import time

from scripts.settings import SECRET, readers_of
from scripts.step_process import send
from scripts.step_state import StepError, StepState, known_steps, last_lines, processes_of

RESUMABLE = ("-env", "-download", "-train", "-eval", "-merge", "-mmcu", "-bleu")
# Steps whose results two runs at once would spoil: one run at a time, also in front. Evaluations look after their files
# themselves (finetune.partial_results), so that two models can be evaluated on two cards.
EXCLUSIVE = ("-env", "-download", "-train", "-merge", "-finalize")

KILLED = 128 + signal.SIGKILL


def advice(name: str, status: int, typed: str = "") -> str:
    """What to do after a step that continues where it stopped; nothing after one that explained itself (status 2)."""
    if status in (0, 2) or not name.endswith(RESUMABLE):
        return ""
    return f"{name} ended with status {status}. The same command continues where it stopped: make {name}{typed}\n"


def typed_settings(makeflags: str, name: str) -> str:
    """The variables of make's command line as they can be typed again for a step, each with a blank before it.

    GNU make hands them on in MAKEFLAGS, behind `--`, their blanks behind backslashes. Without them a training is
    another experiment, or one of another length. What is secret is not shown: the line may be kept in a log.
    """
    words = re.findall(r"(?:\\.|[^\s\\])+", makeflags.partition(" -- ")[2])
    pairs = [re.sub(r"\\(.)", r"\1", word).partition("=") for word in words]
    pairs = [pair for pair in pairs if name in (readers_of(pair[0]) or [name])]  # another goal's would be refused
    values = {key: value.replace("$$", "$") for key, _, value in reversed(pairs) if value}  # make doubles each $
    return "".join(f" {key}={'...' if SECRET.search(key) else shlex.quote(value)}" for key, value in values.items())


def outcome(record: dict) -> str:
    """How a step ended, in a sentence, with time and cost."""
    name, status = record["step"], record["status"]
    if status in ("running", "lost"):
        text = {"running": "is running", "lost": "was lost: its supervisor was killed (out of memory, reboot?)"}[status]
        return f"{name} {text}."
    code = record["exit_status"]
    text = f"{name} {status} after {duration(record['seconds'])}{_cost(record)}, exit status {code}."
    if code == KILLED and status == "failed":
        text += " It was killed, perhaps for lack of main memory (look: dmesg)."
    return text + (" The same command continues it." if advice(name, code) else "")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _cost(record: dict) -> str:
    if not record["price_per_hour"] or "seconds" not in record:
        return ""
    return f", {record['seconds'] / 3600 * record['price_per_hour']:.2f} yuan"


def show_status(name: str | None) -> int:
    """One line a step and the newest line of its log; with a name only that step and its command."""
    steps = [_find(name)] if name else known_steps()
    if not steps:
        print("No step was started in the background yet. Start one, for example: make qwen-train BG=1")
    for step in steps:
        record = step.read()
        spent = f"{duration(record['seconds'])}{_cost(record)}" if "seconds" in record else ""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["started"]))
        print(f"{step.name:<20} {record['status']:<9} pid {record['pid'] or '-':<8} since {began}  {spent}")
        if record["status"] in ("failed", "lost"):
            print(f"  {outcome(record)}")
        if name:
            print(f"  command: {' '.join(record['command'])}")
        for line in last_lines(step.log, 5 if name else 1):
            print(f"  {line[:150]}")
    return 0


def follow_log(name: str | None, follow: bool) -> int:
    """Print a log; when following, go on until the step ends (Ctrl-C leaves the step running)."""
    step = _find(name) if name else _newest()
    with open(step.log, encoding="utf-8", errors="replace") as log:
        while True:
            running = step.is_running()  # asked before reading: what an ending step wrote last is read below
            text = log.read()
            print(text, end="", flush=True)
            if not follow or not running:
                break
            time.sleep(0.2)
    print(outcome(step.read()), file=sys.stderr)
    return 0


def stop(name: str | None, timeout: float | None, dry_run: bool = False) -> int:
    """Send SIGTERM, wait until the step has ended and say how. Only with a timeout is it killed after that."""
    step = _find(name) if name else _only_running()
    if step is None:
        print("Nothing is running in the background.")
        return 0
    record = step.read()
    if not _has_processes(record):
        print(f"Not running: {outcome(record)}")
        return 0
    if dry_run:
        print(f"Would send SIGTERM to {step.name} (pid {record['pid']}) and wait for its end.")
        return 0
    limit = (
        f"it is killed after {timeout:g} s" if timeout is not None else "no time limit; set one with TIMEOUT=seconds"
    )
    print(f"SIGTERM sent to {step.name} (pid {record['pid']}), waiting for its end ({limit})", flush=True)
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    send([record["supervisor"]] if record["status"] == "running" else processes_of(record["mark"]), signal.SIGTERM)
    while step.is_running() or processes_of(record["mark"]):
        if time.monotonic() > deadline:
            print(f"{step.name} did not end in {timeout:g} s: SIGKILL", flush=True)
            send(processes_of(record["mark"]), signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.1)
    print(outcome(step.read()))
    return 0


def _has_processes(record: dict) -> bool:
    """Whether there is something to end: of a lost step often nothing is left."""
    return record["status"] == "running" or record["status"] == "lost" and bool(processes_of(record["mark"]))


def _find(name: str) -> StepState:
    steps = known_steps()
    for step in steps:
        if step.name == name:
            return step
    known = ", ".join(step.name for step in steps) or "none yet"
    raise StepError(f"no step {name} was started in the background. Known: {known}")


def _newest() -> StepState:
    steps = known_steps()
    if not steps:
        raise StepError("no step was started in the background yet. Start one, for example: make qwen-train BG=1")
    return next((step for step in steps if step.is_running()), steps[0])


def _only_running() -> StepState | None:
    running = [step for step in known_steps() if _has_processes(step.read())]
    if len(running) > 1:
        raise StepError(f"several steps are running; say which: make stop STEP={'|'.join(s.name for s in running)}")
    return running[0] if running else None
