"""Full fine-tuning without fp32 master weights beside a run that has them: losses, and how far the weights moved.

    python -m benchmarks.masters FOLDER                                  # SmolLM2-135M, 200 updates, on a CPU
    python -m benchmarks.masters FOLDER --only nearest,stochastic        # these runs; what is done is not done again
    python -m benchmarks.masters FOLDER --model DIR --updates 50 --rows 4 --tokens 512   # on a card if there is one

Up to four runs start from the same bfloat16 weights and see the same rows, at the shipped configuration's learning
rate, constant from the first update on so that 200 of them count:

- masters: DeepSpeed stage 1 on one rank, bfloat16 weights beside fp32 masters and moments. What others are held against
- stochastic: our way without DeepSpeed, bfloat16 weights and moments, rounded stochastically
- nearest: the same with torch's AdamW, which rounds to the nearest (benchmarks.train_nearest)
- float32: 32 bits throughout, which shows what the arithmetic of the passes alone changes

The held-out loss is that of the trained weights in 32-bit arithmetic. FOLDER belongs to one experiment: base/, runs/,
logs/, and masters.md, masters.png and masters.json with the losses of all updates.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import smollm2
from benchmarks.machine import REPOSITORY
from benchmarks.masters_table import REFERENCES, draw, page
from benchmarks.ranks import training_command
from benchmarks.train_runs import execute
from finetune.errors import UserError, run_main
from finetune.report import git_commit, versions, write_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "llm_code/training_config/baichuan2_config.json"
STAGE_1 = "llm_code/deepspeed_config/deepspeed_stage_1_config.json"
TRAIN_ROWS, HELD_OUT_ROWS = "llm_code/data/psychology_data.jsonl", "llm_code/data/psychology_test.jsonl"
PROGRAMS = {
    "masters": ["llm_code.train"],
    "stochastic": ["llm_code.train"],
    "nearest": ["benchmarks.train_nearest"],
    "float32": ["benchmarks.train_exact", "llm_code.train"],
}
TOKENS_AT_ONCE = 2048  # of the held-out rows
LIMIT_S = 4 * 3600.0
# glibc then asks for huge pages: half the time of an update on a CPU goes into page faults otherwise.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags. Raises UserError for an unknown run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="a native checkpoint [SmolLM2-135M, fetched with pip]")
    parser.add_argument("--only", default=",".join(PROGRAMS), metavar="NAME,NAME", help="these runs [all]")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2, help="of an update [2]")
    parser.add_argument("--tokens", type=int, default=128, help="of a row at most [128]")
    flags = parser.parse_args(arguments)
    flags.only = flags.only.split(",")
    unknown = [name for name in flags.only if name not in PROGRAMS]
    if unknown or not set(REFERENCES).intersection(flags.only):
        raise UserError(f"--only: name runs of {', '.join(PROGRAMS)}, {' or '.join(REFERENCES)} among them.")
    return flags


def prepare_base(folder: Path, source: Path | None) -> Path:
    """folder/base: the model in bfloat16, so that all runs start from the same numbers."""
    base = folder / "base"
    if base.exists():
        return base
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = source or smollm2.prepare(smollm2.DEFAULT)
    unfinished = folder / "base.unfinished"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source).save_pretrained(unfinished)
    return unfinished.rename(base)


def training_flags(name: str, flags: argparse.Namespace) -> list[str]:
    """Flags of llm_code.train for a run; what is not named here is the shipped configuration's."""
    words = f"--train_args_file {CONFIG} --train_file {TRAIN_ROWS} --logging_steps 1 --report_to none"
    words += f" --max_steps {flags.updates} --per_device_train_batch_size {flags.rows} --gradient_accumulation_steps 1"
    words += f" --max_seq_length {flags.tokens} --warmup_steps 0 --lr_scheduler_type constant_with_warmup"
    words += " --dataloader_num_workers 0 --optim adamw_torch"
    words += f" --bf16 {'false' if name == 'float32' else 'true'}"
    # Only DeepSpeed's checkpoint has the masters: final/ is 16-bit.
    more = f" --deepspeed {STAGE_1} --save_steps {flags.updates}"
    words += more if name == "masters" else " --deepspeed none --save_strategy no"
    places = ("--model_name_or_path", str(flags.folder / "base"), "--output_dir", str(flags.folder / "runs" / name))
    return [*words.split(), *places]


def command_of(name: str, flags: argparse.Namespace) -> list[str]:
    """The process of a run: for `masters` as llm_code/train_ft.sh starts it."""
    module, *words = PROGRAMS[name]
    return [*training_command(module, has_zero=name == "masters"), *words, *training_flags(name, flags)]


def train(name: str, flags: argparse.Namespace) -> None:
    """Run to the end, unless final/ is there. Raises UserError with the last line of a run that failed."""
    if (flags.folder / "runs" / name / "final").exists():
        return
    print(f"-----> {name}, the log is in {flags.folder / 'logs'}", file=sys.stderr, flush=True)
    ended = execute(command_of(name, flags), flags.folder / "logs" / f"{name}.log", LIMIT_S)
    if ended.status:
        raise UserError(f"{name}: {ended.lines[-1] if ended.lines else f'ended with {ended.status}'}")


def result_of(run: Path) -> dict[str, Any]:
    """What a run's report says: losses of all updates and seconds of the median update."""
    report = json.loads((run / "train_report.json").read_text(encoding="utf-8"))
    history = [entry for entry in report["history"] if "loss" in entry]
    tokens = report["tokens"] / report["updates"]
    speeds = sorted(entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry)
    return {
        "losses": [entry["loss"] for entry in history],
        "learning_rate": report["config"]["learning_rate"],
        "tokens_per_update": round(tokens),
        "seconds_per_update": round(tokens / speeds[len(speeds) // 2], 2),
    }


def model_of(run: Path, base: Path) -> Path:
    """The model that the optimiser updated: final/, or the fp32 masters put together from DeepSpeed's checkpoint."""
    from finetune.final_model import complete
    from finetune.saving import newest_checkpoint

    checkpoint, target = newest_checkpoint(run)[0], run / "fp32"
    if checkpoint is None:
        return run / "final"
    if not (target / "config.json").exists():
        import torch
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        from transformers import AutoModelForCausalLM

        # Through a model, because finetune.zero.weights_from_zero cannot write SmolLM2's tied head.
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with contextlib.redirect_stdout(sys.stderr):
            model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))
        model.save_pretrained(target)
        complete(target, base, norm_head=False)
    return target


def _tensors(folder: Path, names: Sequence[str]) -> "Iterator[Tensor]":
    """The named tensors, one at a time, in 64 bits, on the card where there is one."""
    from safetensors import safe_open

    from finetune.tensor_files import tensor_places

    places = tensor_places(folder)
    for name in names:
        with safe_open(places[name].file, framework="pt") as file:
            yield file.get_tensor(name).to(_device()).double()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _moved(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(_device()) if hasattr(value, "to") else value for key, value in batch.items()}


def movement(weights: Path, references: dict[str, Path], base: Path) -> dict[str, Any]:
    """How far `weights` are from `base`, and how that compares with the ways of `references`.

    moved: L2 norm of the difference from base; along: for each reference the part of its way that was gone, 1 for all
    of it; changed: the share of numbers that are others than in base.
    """
    from finetune.tensor_files import tensor_places

    names = sorted(tensor_places(base))
    moved = changed = count = 0.0
    products, squares = (dict.fromkeys(references, 0.0) for _ in range(2))
    folders = (base, weights, *references.values())
    for start, end, *targets in zip(*(_tensors(folder, names) for folder in folders), strict=True):
        way = end - start
        moved += way.square().sum().item()
        changed += way.count_nonzero().item()
        count += way.numel()
        for name, target in zip(references, targets, strict=True):
            squares[name] += (target - start).square().sum().item()
            products[name] += (way * (target - start)).sum().item()
    along = {name: products[name] / squares[name] for name in references}
    return {"moved": moved**0.5, "along": along, "changed": changed / count}


def held_out_loss(model_dir: Path, max_seq_length: int) -> float:
    """Mean loss of a supervised token of the held-out rows, in 32-bit arithmetic."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.attention import PADDING_FREE, enable_padding_free_attention
    from finetune.batching import collate, plan_epoch
    from finetune.conversation import encode_rows
    from finetune.loss import enable_chunked_loss
    from finetune.rows import read_rows
    from finetune.updates import count_supervised

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=PADDING_FREE)
    enable_padding_free_attention(enable_chunked_loss(model.eval().to(_device())))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    samples, _ = encode_rows(tokenizer, read_rows(REPOSITORY / HELD_OUT_ROWS), max_seq_length)
    plan = plan_epoch([len(sample.input_ids) for sample in samples], len(samples), 1, TOKENS_AT_ONCE, 0, 0)[0]
    with torch.no_grad():
        batches = [collate([samples[row] for row in rows]) for rows in plan.micro_batches[0]]
        losses = [model(**_moved(batch)).loss.item() for batch in batches]
    return sum(losses) / sum(map(count_supervised, samples))


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Everything that the page shows, of the runs that are named."""
    base, runs = flags.folder / "base", flags.folder / "runs"
    models = {name: model_of(runs / name, base) for name in flags.only}
    references = {name: models[name] for name in REFERENCES if name in models}
    if "masters" in models:  # the weights of the passes, and what is published
        models["copy"] = runs / "masters" / "final"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": device_text(),
        "versions": versions(),
        "git_commit": git_commit(REPOSITORY),
        "rows_per_update": flags.rows,
        "tokens_per_row": flags.tokens,
        "runs": {name: result_of(runs / name) for name in flags.only},
        "held_out_loss_before": held_out_loss(base, flags.tokens),
        "weights": {
            name: movement(model, references, base) | {"held_out_loss": held_out_loss(model, flags.tokens)}
            for name, model in models.items()
        },
    }


def device_text() -> str:
    """The card, or the number of CPU cores and their vector unit."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return f"{os.cpu_count()} CPU cores, {'AVX512-BF16' if has_bf16 else torch.backends.cpu.get_cpu_capability()}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    flags = parse(arguments)
    flags.folder.mkdir(parents=True, exist_ok=True)
    for key, value in HUGE_PAGES.items():
        os.environ.setdefault(key, value)
    prepare_base(flags.folder, flags.model)
    for name in flags.only:
        train(name, flags)
    found = measure(flags)
    write_json(flags.folder / "masters.json", found)
    draw(found, flags.folder / "masters.png")
    text = page(found)
    (flags.folder / "masters.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
