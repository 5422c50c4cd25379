"""The NVIDIA cards of this machine, as nvidia-smi tells them.

python3 scripts/nvidia.py show     # nvidia-smi
python3 scripts/nvidia.py watch    # the same every second, until Ctrl-C
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

MISSING = (
    "No NVIDIA card here: nvidia-smi is not on PATH. On a rented box choose an instance with a card; "
    "without one only the small models of make quickstart and make test run, on the processor."
)
ROW = re.compile(r"(\d+), (.+), (\d+), (\S+)")  # a card that does not answer has [N/A], no card at all a sentence
SILENT = "nvidia-smi lists no card: run it to see why (make gpu)."


@dataclass(frozen=True)
class Card:
    index: int
    name: str
    memory_mib: int
    driver: str


def find_cards() -> list[Card]:
    """The cards nvidia-smi lists; none when it is missing or cannot reach the driver."""
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (ROW.fullmatch(line) for line in text.decode(errors="replace").splitlines())
    return [Card(int(row[1]), row[2], int(row[3]), row[4]) for row in rows if row]


def none_found() -> str:
    """Why no card was found."""
    return SILENT if shutil.which("nvidia-smi") else MISSING


def cuda_version() -> str:
    """The newest CUDA version the driver supports, from the head of nvidia-smi's table."""
    text = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60).stdout.decode()
    match = re.search(r"CUDA[A-Z ]* Version: *([0-9.]+)", text)
    return match[1] if match else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["show", "watch"])
    action = parser.parse_args().action
    if not shutil.which("nvidia-smi"):
        print(f"error: {MISSING}", file=sys.stderr)
        return 2
    command = ["nvidia-smi"] if action == "show" else ["watch", "-n", "1", "nvidia-smi"]
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
