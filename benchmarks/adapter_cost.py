"""What a LoRA adapter beside its base costs in inference: decoding steps and prompts, in 4 and in 16 bits.

    python -m benchmarks.adapter_cost FOLDER [--model qwen-14b] [--rows 1,8,32]    # tiny-qwen where there is no card

Three ways: the base alone; the adapter as load_for_inference adds it, before an output is rounded; peft's own sum of
rounded outputs. First by transformers' forward with a growing cache, as evaluation runs it; then by the local engine,
whose decoding steps are captured graphs. Weights, prompts and the adapter (rank 64, B moved by 0.0005) are random.
FOLDER holds the model (14B: 28 GB).
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.random_model import build
from benchmarks.serve_gpu import NumberTokenizer, decode_rate, median_seconds, random_prompts, synchronize
from finetune.errors import run_main
from finetune.generate import causal_model
from finetune.models import load_for_inference
from finetune.projection import fuse_for_inference
from finetune.qlora import attach_lora
from finetune.tables import markdown_table
from llm_code.module_interface.local_engine import LocalEngine, LocalOptions

PROMPT_TOKENS = 165
STEPS = 9  # of decoding; the first ones warm up
NEW_TOKENS = 96  # of the engine's answers
HEADER = ("bits", "way", "rows", "ms a step", "ms of prompts", "engine, tokens/s", "its graphs", "GiB of weights")


def with_adapter(model: Any) -> Any:
    """`model` with a random adapter, not yet fused: peft computes it."""
    torch.manual_seed(0)
    model = attach_lora(model, 64, 16, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.uniform_(parameter, -5e-4, 5e-4)
    return model.eval()


def ways_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and model, one after the other: each changes the one before it."""
    yield "base alone", model
    model = with_adapter(model)
    yield "peft", model
    fuse_for_inference(model)
    yield "ours", model


@torch.inference_mode()
def step_times(lm: Any, rows: int) -> tuple[float, float]:
    """Milliseconds of a decoding step and of all rows' prompts, medians."""
    ids_BT = torch.tensor(random_prompts(rows, lm.config.vocab_size, PROMPT_TOKENS, PROMPT_TOKENS), device=lm.device)
    prompts = 1e3 * median_seconds(lambda: lm(input_ids=ids_BT, use_cache=True, logits_to_keep=1), 3)
    cache = lm(input_ids=ids_BT, use_cache=True, logits_to_keep=1).past_key_values
    last_B1 = ids_BT[:, -1:]
    times = [1e3 * median_seconds(lambda: lm(input_ids=last_B1, past_key_values=cache), 1) for _ in range(STEPS)]
    return median(times[STEPS // 3 :]), prompts


@contextmanager
def engine_of(model: Any, max_batch: int) -> Iterator[LocalEngine]:
    """The local engine over the model, its memory given back afterwards."""
    engine = LocalEngine(model, NumberTokenizer(), options=LocalOptions(max_batch=max_batch, context=1024))
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def engine_rates(model: Any, all_rows: Sequence[int]) -> tuple[list[float], int]:
    """Tokens per second with so many requests at once, and how many steps are captured."""
    vocabulary = causal_model(model).config.vocab_size
    with engine_of(model, max(all_rows)) as engine:
        prompts = random_prompts(max(all_rows), vocabulary, PROMPT_TOKENS, PROMPT_TOKENS)
        decode_rate(engine, prompts[:1], NEW_TOKENS)
        rates = [decode_rate(engine, prompts[:rows], NEW_TOKENS)[0] for rows in all_rows]
        return rates, len(getattr(engine._worker.runner, "graphs", {}))


def measure(folder: Path, bits: int, all_rows: Sequence[int]) -> Iterator[list[str]]:
    """Lines of the table for a model in 4 or 16 bits."""
    gc.collect()  # the model before
    model, _ = load_for_inference(folder, load_in_4bit=bits == 4, dtype="bfloat16")
    for way, current in ways_of(model):
        synchronize()
        memory = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        times = [step_times(causal_model(current), rows) for rows in all_rows]
        rates, graphs = engine_rates(current, all_rows)
        for rows, (step, prompts), rate in zip(all_rows, times, rates, strict=True):
            speed = f"{rate:,.0f}" if rate > 0 else "-"  # none while all of them were answered at once
            yield [str(bits), way, str(rows), f"{step:.1f}", f"{prompts:.1f}", speed, str(graphs), f"{memory:.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="qwen-14b" if on_gpu else "tiny-qwen", help="of benchmarks.random_model")
    parser.add_argument("--rows", default="1,8,32", help="at once, several with commas [%(default)s]")
    parser.add_argument("--bits", default="4,16", help="[%(default)s]")
    flags = parser.parse_args(arguments)
    folder = build(flags.folder.absolute(), flags.model)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{flags.model}, prompts of {PROMPT_TOKENS} tokens, {name}, torch {torch.__version__}\n", flush=True)
    all_rows = list(map(int, flags.rows.split(",")))
    print("\n".join(markdown_table(HEADER, [])))
    for bits in flags.bits.split(","):
        for line in measure(folder, int(bits), all_rows):
            print(markdown_table(HEADER, [line])[-1], flush=True)


if __name__ == "__main__":
    run_main(main)
