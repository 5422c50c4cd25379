"""Would a kept 4-bit copy of a model load faster than the 16-bit checkpoint that is quantised on the way?

    python -m benchmarks.start_up FOLDER [--model qwen-14b]      # tiny-qwen where there is no card

Loads both as training does, each in a process of its own, with the files in the page cache and after they were dropped
from it. Says whether the weights are the same. FOLDER holds the model (14B: 28 GB) and its 4-bit copy (10 GB).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import REPOSITORY
from benchmarks.random_model import build
from finetune.errors import run_main
from finetune.nf4 import is_4bit
from finetune.qlora import load_quantized
from finetune.tables import markdown_table

HEADER = ("what is loaded", "GB of files", "s from the page cache", "s from the disk")


def load(folder: Path) -> tuple[Any, float]:
    """The model, and seconds from the call until the device has it; imports are not counted."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    started = time.perf_counter()
    model = load_quantized(folder, device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return model, time.perf_counter() - started


def checksum(model: Any) -> str:
    """Of the 4-bit weights and their scales: equal for equal weights."""
    total = 0
    for module in model.modules():
        if is_4bit(module):
            state = module.weight.quant_state
            for tensor in (module.weight.data, state.absmax, state.state2.absmax):
                total = (31 * total + tensor.contiguous().view(torch.uint8).long().sum().item()) % 2**61
    return f"{total:x}"


def drop_from_cache(folder: Path) -> None:
    """Let the system forget the folder's files, so that the next reader waits for the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loaded(folder: Path, *more: str) -> dict[str, Any]:
    """What a process that loads the folder says: seconds, checksum."""
    command = [sys.executable, "-m", "benchmarks.start_up", str(folder), "--one", *more]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row_of(title: str, folder: Path, repeats: int) -> tuple[list[str], str]:
    """A line of the table, and the checksum of the weights."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = loaded(folder)  # reads what is not in the cache yet
    warm = [loaded(folder)["seconds"] for _ in range(repeats)]
    cold = []
    for _ in range(repeats):
        drop_from_cache(folder)
        cold.append(loaded(folder)["seconds"])
    return [title, f"{size / 1e9:.1f}", f"{median(warm):.1f}", f"{median(cold):.1f}"], found["checksum"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="qwen-14b" if on_gpu else "tiny-qwen", help="of benchmarks.random_model")
    parser.add_argument("--repeats", type=int, default=2, help="medians of so many loads [%(default)s]")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.one:
        model, seconds = load(flags.folder)
        if flags.save:
            model.save_pretrained(flags.save)
        return print(json.dumps({"seconds": seconds, "checksum": checksum(model)}))
    source, copy = build(flags.folder.absolute() / "model", flags.model), flags.folder.absolute() / "nf4"
    if not (copy / "config.json").exists():
        loaded(source, "--save", str(copy))
    folders = {"16-bit checkpoint, quantised while loading": source, "its 4-bit copy": copy}
    rows = [row_of(title, folder, flags.repeats) for title, folder in folders.items()]
    print("\n".join(markdown_table(HEADER, [row for row, _ in rows])))
    print(f"\nthe weights are {'the same' if rows[0][1] == rows[1][1] else 'NOT the same'}")


if __name__ == "__main__":
    run_main(main)
