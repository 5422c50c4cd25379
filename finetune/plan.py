"""What a training run will take: memory of each card by part, time, money, disk; also for cards one has not got.

    python -m finetune.plan --method qlora --train_args_file qwen_qlora/config/qwen-14b-qlora.json --gpu A40
    python -m finetune.plan --method full --model baichuan2-7b --gpu A100-80G --num_gpus 2 \\
        --rows 77250 --mean_tokens 330 --max_seq_length 512

Pure arithmetic (finetune.memory, finetune.speed), no torch, nothing is loaded. The model is a folder with a
config.json or one of the names below; the rows are counted in the file, their tokens estimated from its characters,
unless given. Prints tables to stdout; exit status 1 when nothing fits.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from finetune.arguments import Arguments, nearest, parse_arguments
from finetune.errors import UserError, run_main
from finetune.gpus import GIB, GPUS, Gpu, found_gpu, named_gpu, price_per_hour, with_memory
from finetune.json_files import read_json_object
from finetune.memory import (
    ADAM_STATE_BYTES,
    KNOWN_SHAPES,
    STATE_BYTES,
    Shape,
    full_saved_bytes,
    shape_of_config,
    total,
)
from finetune.plan_options import (
    Option,
    Workload,
    choose,
    counts,
    full_options,
    qlora_option,
    usable_bytes,
    warmup_note,
)
from finetune.saving import existing_parent, free_bytes
from finetune.speed import layers_allowed

# Tokens of a Chinese or mixed text for each character, both vocabularies, and of the template around a turn.
TOKENS_PER_CHARACTER, TOKENS_PER_TURN = 0.75, 12
TIMES = (
    "times: fitted to one measured H100, of several cards to two H200; another card's are scaled by its peak rate,\n"
    "transfers computed from its links. What counts is the tokens/s of the first updates."
)
WALKTHROUGH = (
    "For comparison, the walkthrough's own 7B runs (padded batches, 2 epochs): on 2 x A100-80G only stage 3 ran,\n"
    "about 14 hours without offloading and 20 with it; on 4 x A100-80G stage 1 was enough."
)


# ---- what is asked for ----


def estimated_tokens(row: dict) -> float:
    """Tokens of a decoded row of either spelling, from its characters."""
    if "conversation" in row:
        texts = [text for turn in row["conversation"] for text in (turn.get("human", ""), turn.get("assistant", ""))]
        texts += [row["system"]] if row.get("system") else []
    else:
        texts = [message.get("content", "") for message in row.get("messages", [])]
    return sum(len(text) * TOKENS_PER_CHARACTER + TOKENS_PER_TURN for text in texts)


def rows_of_file(path: str, max_seq_length: int) -> tuple[int, float]:
    """(rows, mean tokens) of a .jsonl file, tokens estimated from characters and cut to the limit."""
    from finetune.rows import iter_lines

    lengths = []
    for line, text in iter_lines(Path(path)):
        try:
            tokens = estimated_tokens(json.loads(text))
            if not tokens:
                raise TypeError("neither conversation nor messages")
            lengths.append(min(max_seq_length, tokens))
        except (json.JSONDecodeError, AttributeError, TypeError):
            raise UserError(f"{path}:{line}: not a training row. Check the file: make qwen-data") from None
    if not lengths:
        raise UserError(f"{path}: expected at least one training row, found none.")
    return len(lengths), sum(lengths) / len(lengths)


def shape_of(model: str) -> Shape:
    """Shape of a folder's config.json, or of a name such as qwen-14b or a hub id that contains one."""
    config = Path(model) / "config.json"
    if config.is_file():
        return shape_of_config(read_json_object(config, "model configuration", ""))
    name = Path(model).name.lower()
    known = next((known for known in KNOWN_SHAPES if name.startswith(known)), None)
    if known is None:
        names = ", ".join(KNOWN_SHAPES)
        raise UserError(
            f"no config.json in {model}, and the name is none of {names}{nearest(name, list(KNOWN_SHAPES))}."
        )
    return KNOWN_SHAPES[known]


def gpus_here() -> tuple[Gpu | None, int]:
    """(card, number) that nvidia-smi and CUDA_VISIBLE_DEVICES show, (None, 0) without one.

    The card has the memory it was found with. Raises UserError for one that is not in the table or tells no memory.
    """
    if not shutil.which("nvidia-smi"):
        return None, 0
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None, 0
    name, _, mebibytes = lines[0].rpartition(",")
    try:
        memory_gib = float(mebibytes) / 1024
    except ValueError:  # [N/A], of a card that does not answer or shares the host's memory
        raise _no_plan_for(f"nvidia-smi tells no memory of {name}: {mebibytes.strip()}.") from None
    gpu = found_gpu(name, memory_gib)
    if gpu is None:
        raise _no_plan_for(f"{name} is not a card known here.")
    visible = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    return with_memory(gpu, memory_gib), len(visible) or len(lines)


def _no_plan_for(problem: str) -> UserError:
    known = ", ".join(gpu.name for gpu in GPUS)
    return UserError(f"{problem} Plan with a similar one (GPU=A40; known: {known}), train with DEEPSPEED_STAGE set.")


def decide_gpu(name: str | None, num_gpus: int | None) -> tuple[Gpu, int, str]:
    """(card, number, where that is from)."""
    here, count = gpus_here() if not name else (None, 0)
    gpu = named_gpu(name) if name else here
    if gpu is None and name:
        names = [gpu.name for gpu in GPUS]
        raise UserError(f"--gpu {name}: not a card known here{nearest(name, names)}. Known: {', '.join(names)}.")
    if gpu is None:
        return named_gpu("A40"), num_gpus or 1, "no card found here: the walkthrough's, another with --gpu"
    return gpu, num_gpus or count or 1, "as asked" if name else "found here"


def workload(arguments: Arguments, gpus: int, rows: int | None, mean_tokens: float | None) -> Workload:
    """The rows of the experiment. Raises UserError when neither a file nor a number of rows is known."""
    train, data = arguments.train, arguments.data
    if rows is None or mean_tokens is None:
        if not data.train_file:
            raise UserError("neither train_file nor --rows and --mean_tokens is given. Name the rows.")
        found_rows, found_tokens = rows_of_file(data.train_file, data.max_seq_length)
        rows, mean_tokens = rows or found_rows, mean_tokens or found_tokens
    mean_tokens = min(mean_tokens, data.max_seq_length)  # longer rows are cut
    if not data.eval_file:
        rows = max(1, rows - round(rows * data.eval_split_percentage / 100))
    per_update = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    return Workload(rows, mean_tokens, train.num_train_epochs, data.max_seq_length, per_update, train.max_steps)


# ---- what is printed ----


def hours(seconds: float) -> str:
    """1.5 h, or 12 min below an hour."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def table(options: Sequence[Option], usable: float, chosen: Option | None, price: float) -> str:
    """One line an option: GiB per card by part, whether it fits, tokens of a micro-batch, time, money.

    `usable` is in bytes a card, `price` that of one card for an hour.
    """
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    head = f"{'way':>10} {'cards':>5} " + " ".join(f"{name[:11]:>11}" for name in names)
    lines = [f"{head} {'GiB a card':>10} {'of':>6} {'tokens':>7} {'kept':>5} {'time':>8} {'money':>8}"]
    for option in options:
        values = " ".join(f"{option.parts[name] / GIB:11.1f}" for name in names)
        needs = f"{total(option.parts) / GIB:10.1f} {usable / GIB:6.1f}"
        if option.budget is None:
            rest = f"{'does not fit':>31}"
        else:
            money = f"{option.seconds / 3600 * price * option.gpus:8.2f}" if price else f"{'-':>8}"
            rest = f"{option.budget.tokens:7,} {option.budget.layers_kept:5} {hours(option.seconds):>8} {money}"
        mark = "  <- choice" if option is chosen else ""
        lines.append(f"{option.name:>10} {option.gpus:5} {values} {needs} {rest}{mark}")
    return "\n".join(lines)


def disk_lines(shape: Shape, way: str, arguments: Arguments) -> str:
    """Disk of a run: checkpoints kept, one while it is written, final/. `way` is qlora or a DeepSpeed stage."""
    train, data = arguments.train, arguments.data
    if way == "qlora":
        numbers = shape.lora_parameters(arguments.lora.lora_rank)
        one, final = numbers * (4 + STATE_BYTES.get(train.optim, ADAM_STATE_BYTES)), numbers * 4
    else:
        one, final, _ = full_saved_bytes(shape.parameters, way)
    if train.save_strategy == "no":
        return f"disk: needs {final / 1e9:.1f} GB for final/; save_strategy is no{free_text(train.output_dir)}"
    limit, has_best = train.save_total_limit, bool(data.eval_file or data.eval_split_percentage)
    needed = one * (limit + 1 + has_best) + final
    return (
        f"disk: needs {needed / 1e9:.1f} GB for {limit} checkpoint{'s' if limit > 1 else ''} of {one / 1e9:.1f} GB, "
        f"{'the best one, ' if has_best else ''}one more while it is written, and final/ of {final / 1e9:.1f} GB"
        f"{free_text(train.output_dir)}"
    )


def free_text(output_dir: str | None) -> str:
    """What is free where the training will write, or above it where that is not there yet."""
    if not output_dir:
        return ""
    try:
        return f"; {free_bytes(output_dir) / 1e9:.1f} GB are free in {existing_parent(Path(output_dir).absolute())}"
    except OSError:  # a folder that this user may not look into
        return ""


def advice(method: str, gpu: Gpu, gpus: int, shape: Shape, arguments: Arguments, work: Workload) -> str:
    """What to turn when nothing fits, with the cards that would do."""
    if method == "qlora":
        enough = [g.name for g in GPUS if qlora_option(shape, g, gpus, arguments, work).budget]
        turns = "lower max_seq_length, then lora_rank"
    else:
        enough = [g.name for g in GPUS if choose(full_options(shape, g, gpus, arguments.train, work))]
        turns = "lower max_seq_length, use more cards (--num_gpus), or train an adapter instead (make qwen-plan)"
    if arguments.train.tokens_per_micro_batch:
        turns = f"set tokens_per_micro_batch to 0, then what fits is found; {turns}"
    if layers_allowed(arguments.train, shape.layers):
        turns = f"set gradient_checkpointing to true and recompute_layers to -1; {turns}"
    cards = f" Cards on which it fits: {', '.join(enough)}." if enough else ""
    return f"nothing fits on {gpus} x {gpu.name}: {turns}.{cards}"


def print_plan(
    method: str, shape: Shape, gpu: Gpu, gpus: int, arguments: Arguments, work: Workload, price: float
) -> int:
    """All tables; 0 when something fits on the cards asked for, else 1."""
    if method == "qlora":
        here = [qlora_option(shape, gpu, gpus, arguments, work)]
        others = [qlora_option(shape, gpu, n, arguments, work) for n in counts(gpus)]
    else:
        here = full_options(shape, gpu, gpus, arguments.train, work)
        others = [choose(full_options(shape, gpu, n, arguments.train, work)) for n in counts(gpus)]
    chosen, usable = choose(here), usable_bytes(gpu, arguments.train.memory_limit_gib)
    print(table(here, usable, chosen, price))
    print("\nby number of cards, the best way of each, the rows of an update kept as they are:")
    fitting = [option for option in others if option is not None]
    print(table(fitting, usable, None, price) if fitting else "  none fits")
    print(TIMES)
    print(f"\n{disk_lines(shape, (chosen or here[0]).name, arguments)}")
    print(choice_lines(method, chosen, shape) if chosen else advice(method, gpu, gpus, shape, arguments, work))
    if note := warmup_note(arguments.train, work.updates):
        print(note)  # last, where it is seen: it costs a run
    return 0 if chosen else 1


def choice_lines(method: str, chosen: Option, shape: Shape) -> str:
    """The choice in words."""
    kept = f"{chosen.budget.layers_kept} of {shape.layers} layers not recomputed"
    lines = [f"choice: {chosen.name} with micro-batches of at most {chosen.budget.tokens:,} tokens, {kept}"]
    if chosen.host_bytes:
        lines.append(f"main memory for offloading: {chosen.host_bytes / GIB:.0f} GiB")
    lines.append(
        "out of memory all the same? In this order: a lower memory_limit_gib, which this plan follows; "
        "gradient_checkpointing true and recompute_layers -1; a lower max_seq_length"
    )
    return "\n".join(lines + ([WALKTHROUGH] if method == "full" else []))


def _how_long(work: Workload) -> str:
    return f"max_steps {work.max_steps:,}" if work.max_steps > 0 else f"{work.epochs:g} epochs"


def parse_flags(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and the rest, which are an experiment's (finetune.arguments)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", choices=("qlora", "full"), default="qlora")
    parser.add_argument("--model", help=f"folder or name ({', '.join(KNOWN_SHAPES)}); default: model_name_or_path")
    parser.add_argument("--gpu", help="card, for example A100-80G; default: the one found here")
    parser.add_argument("--num_gpus", type=int, help="default: as many as found, else 1")
    parser.add_argument("--rows", type=int, help="rows, where there is no file to count them in")
    parser.add_argument("--mean_tokens", type=float, help="mean tokens of a row")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    flags, rest = parse_flags(argv)
    arguments = parse_arguments(rest)
    model = flags.model or arguments.model.model_name_or_path
    if not model:
        raise UserError(f"no model is named. Pass --model with a folder or one of {', '.join(KNOWN_SHAPES)}.")
    if flags.num_gpus is not None and flags.num_gpus < 1:
        raise UserError(f"--num_gpus must be at least 1, found {flags.num_gpus}.")
    if flags.rows is not None and flags.rows < 1:
        raise UserError(f"--rows must be at least 1, found {flags.rows}.")
    if flags.mean_tokens is not None and not 1 <= flags.mean_tokens < math.inf:
        raise UserError(f"--mean_tokens must be at least 1, found {flags.mean_tokens}.")
    shape = shape_of(model)
    gpu, gpus, origin = decide_gpu(flags.gpu, flags.num_gpus)
    work = workload(arguments, gpus, flags.rows, flags.mean_tokens)
    price = price_per_hour()
    print(f"model: {model}, {shape.parameters / 1e9:.2f} B parameters, {shape.layers} layers")
    print(f"cards: {gpus} x {gpu.name} ({origin}), {gpu.memory_gib:.0f} GiB, {gpu.peak_tflops:.0f} TFLOP/s each")
    print(
        f"rows: {work.rows:,} of about {work.tokens:.0f} tokens, {_how_long(work)}, {work.rows_per_update} rows "
        f"an update: {work.updates:,} updates, {work.tokens_in_all / 1e6:.1f} M tokens"
    )
    if price:
        whose = "" if origin == "found here" else ": of this box unless you set it, PRICE_PER_HOUR=..."
        print(f"price: {price:g} an hour for {gpus} card{'s' if gpus > 1 else ''} (PRICE_PER_HOUR{whose})")
    if not gpu.has_bf16:
        print(f"note: {gpu.name} has no bfloat16 and no varlen attention kernel: float16 and slower than estimated")
    print()
    return print_plan(flags.method, shape, gpu, gpus, arguments, work, price / gpus)


if __name__ == "__main__":
    run_main(main)
