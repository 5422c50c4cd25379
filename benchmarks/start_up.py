"""Would a kept 4-bit copy of a model load faster than the 16-bit checkpoint that is quantised on the way?

    python -m benchmarks.start_up FOLDER [--model qwen-14b]      # tiny-qwen where there is no card

Loads both as training does, with the files in the system's page cache and after they were dropped from it, and says
whether the weights are the same. FOLDER holds the model (14B: 28 GB) and its 4-bit copy (10 GB).
"""

import argparse
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.random_model import build
from finetune.errors import run_main
from finetune.nf4 import is_4bit
from finetune.qlora import load_quantized
from finetune.tables import markdown_table

HEADER = ("what is loaded", "GB of files", "s from the page cache", "s from the disk")


def load(folder: Path) -> tuple[Any, float]:
    """The model, and seconds until the device has it."""
    gc.collect()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    model = load_quantized(folder, device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return model, time.perf_counter() - started


def checksum(model: Any) -> int:
    """Of the 4-bit weights and their scales: equal for equal weights."""
    total = 0
    for module in model.modules():
        if is_4bit(module):
            state = module.weight.quant_state
            for tensor in (module.weight.data, state.absmax, state.state2.absmax):
                total = (31 * total + tensor.contiguous().view(torch.uint8).sum(dtype=torch.int64).item()) % 2**61
    return total


def drop_from_cache(folder: Path) -> None:
    """Let the system forget the folder's files, so that the next reader waits for the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(title: str, folder: Path, repeats: int) -> list[str]:
    """A line of the table. The first load, which reads what is not in the cache yet, does not count."""
    load(folder)
    warm, cold = [load(folder)[1] for _ in range(repeats)], []
    for _ in range(repeats):
        drop_from_cache(folder)
        cold.append(load(folder)[1])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return [title, f"{size / 1e9:.1f}", f"{median(warm):.1f}", f"{median(cold):.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    default = "qwen-14b" if torch.cuda.is_available() else "tiny-qwen"
    parser.add_argument("--model", default=default, help="of benchmarks.random_model [%(default)s]")
    parser.add_argument("--repeats", type=int, default=2, help="medians of so many loads [%(default)s]")
    flags = parser.parse_args(arguments)
    source, copy = build(flags.folder.absolute() / "model", flags.model), flags.folder.absolute() / "nf4"
    model, _ = load(source)
    model.save_pretrained(copy)
    before = checksum(model)
    del model
    print("\n".join(markdown_table(HEADER, [])), flush=True)
    for title, folder in (("16-bit checkpoint, quantised while loading", source), ("its 4-bit copy", copy)):
        print(markdown_table(HEADER, [measured(title, folder, flags.repeats)])[-1], flush=True)
    print(f"\nthe weights are {'the same' if checksum(load(copy)[0]) == before else 'NOT the same'}")


if __name__ == "__main__":
    run_main(main)
