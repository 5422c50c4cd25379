"""What a benchmark ran on: the device, its measured product rate, versions.

    python -m benchmarks.machine        # prints JSON

A program of its own, because a process that has used a card keeps some of its memory.
"""

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from finetune.report import git_commit, versions

REPOSITORY = Path(__file__).resolve().parent.parent
MORE_PACKAGES = ("triton", "unsloth")


def product_rate() -> float:
    """FLOP/s of a large product, the median of a second's: 8192 cubed in bfloat16 on a card, small, float32 on a CPU.

    Within that time a card reaches the clock that its power limit allows, which training runs at too: one H100 began
    with 770 TFLOP/s and went on with 690.
    """
    import torch

    on_card = torch.cuda.is_available()
    size, lasting_s = (8192, 1.0) if on_card else (512, 0.05)
    device, dtype = ("cuda", torch.bfloat16) if on_card else ("cpu", torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    while sum(seconds) < lasting_s:
        started = time.perf_counter()
        torch.mm(left, right)
        if on_card:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / median(seconds)


def describe() -> dict[str, Any]:
    """device, memory_gib (None on a CPU), product_rate_tflops, versions, git_commit."""
    import torch

    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    found = versions()
    for name in MORE_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": properties.name if properties else "cpu",
        "memory_gib": round(properties.total_memory / 2**30, 1) if properties else None,
        "product_rate_tflops": round(product_rate() / 1e12, 3),
        "versions": found,
        "git_commit": git_commit(REPOSITORY),
    }


def measure() -> dict[str, Any]:
    """describe(), on a card in a process that ends."""
    import torch

    if not torch.cuda.is_available():
        return describe()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.machine"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(describe()))
