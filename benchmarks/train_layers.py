"""Decoder layers of the 14B shape with LoRA, forward and backward, in ways that training could take.

    python -m benchmarks.train_layers FOLDER [--tokens 1024,8192] [--model tiny-qwen]

A line a way: milliseconds of the device and of Python (which launches ahead of the device), a layer; memory; the norm
of all gradients, which should agree; seconds to get ready. Each is a process of its own that is ended after --limit_s.
FOLDER holds the model, 3 GB, and results.jsonl. The ways:

shipped         what training does
16-bit-base     the 4-bit weights made dense once and kept: nothing left to dequantise
cuda-graph      one graph of all layers, replayed: what fixed token budgets would allow
compiled        torch.compile per layer around our projections, Liger's kernels within it
compiled-plain  the same with transformers' own norms, SwiGLU and rotary positions, which the compiler then fuses
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import REPOSITORY
from benchmarks.random_model import build
from finetune import frozen, projection, qlora
from finetune.batching import collate
from finetune.errors import run_main
from finetune.recipes import attach_recipes
from finetune.tables import markdown_table

WAYS = ("shipped", "16-bit-base", "cuda-graph", "compiled", "compiled-plain")
ROW_TOKENS = 165
REPEATS = 10
HEADER = ("way", "tokens", "device ms a layer", "Python ms a layer", "peak GiB", "gradient norm", "ready in s")
Step = Callable[[], None]


def load(folder: Path, way: str, device: torch.device) -> Any:
    """The decoder with its adapters, as finetune.methods prepares it."""
    if way == "compiled-plain":
        qlora.apply_liger = lambda model: False
    if way == "16-bit-base":
        frozen.Frozen._dense = kept_dense(frozen.Frozen._dense)
        frozen.Frozen._fill_dense = lambda self, out_OI: out_OI.copy_(self._dense(out_OI.dtype))
    if way.startswith("compiled"):
        # The compiler would trace into them and break off at each autograd function.
        call = projection.SharedInput.__call__
        projection.SharedInput.__call__ = torch.compiler.disable(call)
    model = qlora.load_quantized(folder, device, torch.bfloat16)
    torch.manual_seed(0)
    model = qlora.attach_lora(model, 64, 16, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first: no gradient would reach A
            torch.nn.init.normal_(parameter, std=0.01)
    projection.fuse_projections(model)
    attach_recipes(model)
    decoder = model.train().get_decoder()
    if way.startswith("compiled"):
        for layer in decoder.layers:
            layer.compile(dynamic=False)
    return decoder


def kept_dense(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`dense`, computed once a layer."""

    def kept(self: frozen.Frozen, dtype: torch.dtype) -> Tensor:
        if not hasattr(self, "_kept"):
            self._kept = dense(self, dtype)
        return self._kept

    return kept


def batch_of(tokens: int, device: torch.device) -> dict[str, Any]:
    """Packed rows of ROW_TOKENS random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(ROW_TOKENS, tokens - start) for start in range(0, tokens, ROW_TOKENS)]
    ids = [torch.randint(1000, (length,), generator=generator).tolist() for length in lengths]
    batch = collate([SimpleNamespace(input_ids=row, labels=row) for row in ids])
    unused = ("labels", "targets", "target_positions")
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k not in unused}


def step_of(decoder: Any, tokens: int, way: str, device: torch.device) -> Step:
    """One forward and backward pass over `tokens`; gradients of the adapters add up."""
    batch = batch_of(tokens, device)
    gradient = torch.randn(1, tokens, decoder.config.hidden_size, device=device, dtype=torch.bfloat16)

    def step() -> None:
        decoder(**batch).last_hidden_state.backward(gradient.clone())  # Liger's norm writes over what it is given

    return captured(step) if way == "cuda-graph" else step


def captured(step: Step) -> Step:
    """Its kernels as one CUDA graph."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """(milliseconds until the device has finished, until Python has), medians."""
    totals, launched = [], []
    for _ in range(REPEATS):
        wait(device)
        started = time.perf_counter()
        step()
        launched.append(time.perf_counter() - started)
        wait(device)
        totals.append(time.perf_counter() - started)
    return 1e3 * median(totals), 1e3 * median(launched)


def wait(device: torch.device) -> None:
    """For all kernels launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(folder: Path, way: str, all_tokens: list[int]) -> None:
    """Print a JSON line for each number of tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = load(folder, way, device)
    for tokens in all_tokens:
        decoder.zero_grad()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step = step_of(decoder, tokens, way, device)
        for _ in range(2):
            step()
        wait(device)
        ready = time.perf_counter() - started
        milliseconds, python = (value / len(decoder.layers) for value in timed(step, device))
        line = {"way": way, "tokens": tokens, "ms": milliseconds, "python_ms": python, "ready_s": ready}
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        print(json.dumps({**line, "gradient_norm": gradient_norm(decoder, step)}), flush=True)


def gradient_norm(decoder: Any, step: Step) -> float:
    """Of one step. Gradients stay where they are: a graph writes to addresses."""
    gradients = [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]
    torch._foreach_zero_(gradients)
    step()
    return torch.nn.utils.get_total_norm(gradients).item()


def results_of(folder: Path, way: str, tokens: str, limit_s: float) -> list[dict[str, Any]]:
    """The lines of a process; without any, one that says why."""
    command = [sys.executable, "-m", "benchmarks.train_layers", str(folder), "--way", way, "--tokens", tokens]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_s)
        output, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        output, errors = (expired.stdout or b"").decode(), f"ended after {limit_s:.0f} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    missing = len(tokens.split(",")) - len(lines)
    return lines + ([{"way": way, "error": (errors.strip().splitlines() or ["?"])[-1]}] if missing else [])


def row_of(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "error" in result:
        return [result["way"], result["error"], *[""] * (len(HEADER) - 2)]
    figures = [f"{result[name]:.2f}" for name in ("ms", "python_ms", "peak_gib")]
    figures += [f"{result['gradient_norm']:.5g}", f"{result['ready_s']:.1f}"]
    return [result["way"], f"{result['tokens']:,}", *figures]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="1024,8192", help="of a micro-batch, several with commas [%(default)s]")
    parser.add_argument("--model", default="qwen-14b-layers", help="a shape of benchmarks.random_model [%(default)s]")
    parser.add_argument("--ways", default=",".join(WAYS), help="[%(default)s]")
    parser.add_argument("--limit_s", type=float, default=300)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.way:
        return measure(flags.folder, flags.way, [int(tokens) for tokens in flags.tokens.split(",")])
    folder = build(flags.folder.absolute(), flags.model)
    results = []
    with open(folder / "results.jsonl", "w", encoding="utf-8") as file:
        for way in flags.ways.split(","):
            for result in results_of(folder, way, flags.tokens, flags.limit_s):
                print(json.dumps(result), file=file, flush=True)
                results.append(result)
            print(f"-----> {way}: done", file=sys.stderr, flush=True)
    print("\n".join(markdown_table(HEADER, [row_of(result) for result in results])))


if __name__ == "__main__":
    run_main(main)
