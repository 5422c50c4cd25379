"""What tests of the runner of steps share: running it, its records, waiting, and whether a process is there."""

import json
import os
import subprocess
import time
from pathlib import Path

RUN = ["python3", "scripts/run_step.py"]
# A step that says when it is ready, and saves before it leaves: the shape of a training step.
SAVES = 'trap "echo saving; sleep 0.2; echo saved; exit 143" TERM INT; echo ready; while true; do sleep 0.1; done'


def run_step(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command, variables = [*RUN, *arguments], {**os.environ, **environment}
    return subprocess.run(
        command, cwd=checkout, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


def record(checkout: Path, name: str) -> dict:
    return json.loads((checkout / "logs" / f"{name}.json").read_text())


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def exists(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
