"""What an adapter of a short training is worth after it was merged, or beside a 16-bit model.

    python -m benchmarks.small_steps FOLDER [--model_name_or_path DIR] [--rows 8]      # SmolLM2 on a CPU, two minutes

Takes the gradient of B in float32 on a few rows, moves B against its signs as the first steps of Adam do, and measures
how far the loss of the same rows falls: exactly (float32), in the merged model, and with the adapter beside the base in
bfloat16. Each also in the way that is customary: merged weights rounded to the nearest, peft's sum of rounded outputs.
Only weights or outputs differ: merged models are run in float32.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import smollm2
from finetune import rounding
from finetune.conversation import encode_rows
from finetune.errors import run_main
from finetune.merge import write_merged
from finetune.models import load_for_inference, load_tokenizer
from finetune.qlora import attach_lora
from finetune.rows import read_rows
from finetune.tables import markdown_table
from finetune.updates import count_supervised

if TYPE_CHECKING:
    from finetune.conversation import Sample

ROWS = "qwen_qlora/data/text_matching_data_train.jsonl"
STEPS = (5e-5, 2e-4, 1e-3)  # how far each number of B has moved
HEADER = ("B moved by", "exact", "merged", "merged, nearest", "beside, bfloat16", "beside, bfloat16, peft")
LORA_RANK, LORA_ALPHA = 64, 16


def in_bfloat16(source: Path, target: Path) -> Path:
    """A copy of a float32 checkpoint as such models are distributed."""
    from transformers import AutoModelForCausalLM

    shutil.rmtree(target, ignore_errors=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)
    return target


def mean_loss(model: Any, samples: "Sequence[Sample]", backward: bool = False) -> float:
    """Of the supervised tokens; with `backward` its gradient is added to the parameters'."""
    total, count = 0.0, sum(map(count_supervised, samples))
    for sample in samples:
        logits_TV = model(input_ids=torch.tensor([sample.input_ids])).logits[0].float()
        labels_T = torch.tensor(sample.labels)
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=-100, reduction="sum")
        if backward:
            (loss / count).backward()
        total += loss.item()
    return total / count


def write_adapters(base: Path, samples: "Sequence[Sample]", folder: Path) -> list[Path]:
    """For each of STEPS an adapter whose B is that far from 0, against the signs of its gradient."""
    model, _ = load_for_inference(base, dtype="float32")
    torch.manual_seed(0)
    model = attach_lora(model, LORA_RANK, LORA_ALPHA, 0.0)
    mean_loss(model, samples, backward=True)
    adapters = []
    for step in STEPS:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = -step * parameter.grad.sign()
        adapters.append(folder / f"adapter-{step:g}")
        model.save_pretrained(adapters[-1])
    return adapters


@contextmanager
def to_the_nearest() -> Iterator[None]:
    """Merging as it is customary."""
    at_random = rounding.copy_stochastic_
    rounding.copy_stochastic_ = lambda target, source, generator=None: target.copy_(source)
    try:
        yield
    finally:
        rounding.copy_stochastic_ = at_random


@torch.no_grad()
def losses_with(base: Path, adapter: Path, samples: "Sequence[Sample]", folder: Path) -> list[float]:
    """In the order of HEADER."""
    exact = mean_loss(load_for_inference(base, adapter, dtype="float32")[0], samples)
    merged = _merged_loss(base, adapter, samples, folder / "merged")
    with to_the_nearest():
        nearest = _merged_loss(base, adapter, samples, folder / "merged")
    beside, _ = load_for_inference(base, adapter, dtype="bfloat16")
    ours = mean_loss(beside, samples)
    for module in beside.modules():
        if hasattr(module, "_peft_forward"):
            module.forward = module._peft_forward
    return [exact, merged, nearest, ours, mean_loss(beside, samples)]


def _merged_loss(base: Path, adapter: Path, samples: "Sequence[Sample]", target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write_merged(base, adapter, target)
    return mean_loss(load_for_inference(target, dtype="float32")[0], samples)


def measure(folder: Path, source: Path, num_rows: int, rows_file: str = ROWS) -> dict[str, Any]:
    """Losses before, in float32 and bfloat16, and a row of losses for each of STEPS."""
    base = in_bfloat16(source, folder / "base")
    samples = encode_rows(load_tokenizer(base), read_rows(rows_file), 512)[0][:num_rows]
    with torch.no_grad():
        models = ((dtype, load_for_inference(base, dtype=dtype)[0]) for dtype in ("float32", "bfloat16"))
        before = {dtype: mean_loss(model, samples) for dtype, model in models}
    adapters = write_adapters(base, samples, folder)
    after = [losses_with(base, adapter, samples, folder) for adapter in adapters]
    return {"before": before, "after": dict(zip(map(str, STEPS), after, strict=True))}


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """How far each way's loss falls."""
    exact, rounded = found["before"]["float32"], found["before"]["bfloat16"]
    starts = [exact, exact, exact, rounded, rounded]
    return [
        [step, *(f"{loss - start:+.4f}" for loss, start in zip(losses, starts, strict=True))]
        for step, losses in found["after"].items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model_name_or_path", type=Path, help="another model in float32 [SmolLM2-135M, fetched]")
    parser.add_argument("--rows", type=int, default=8)
    flags = parser.parse_args(arguments)
    source = flags.model_name_or_path or smollm2.prepare(flags.folder / "SmolLM2-135M-fp32")
    found = measure(flags.folder, source, flags.rows)
    (flags.folder / "small_steps.json").write_text(json.dumps(found, indent=2))
    print(
        f"loss before {found['before']['float32']:.4f}, in bfloat16 {found['before']['bfloat16']:.4f}; change of it:\n"
    )
    print("\n".join(markdown_table(HEADER, rows_of(found))))


if __name__ == "__main__":
    run_main(main)
