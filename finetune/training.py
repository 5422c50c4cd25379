"""One training run from its arguments to final/: what both projects' entry points do.

Reads the base model's folder and the rows; writes OUTPUT_DIR/{checkpoint-N, final, runs, loss.png, train_report.json}.
Everything that can be refused is refused before the model is loaded.
"""

import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import saving
from finetune.arguments import Arguments, require
from finetune.errors import UserError
from finetune.memory import Shape, shape_of_config, total
from finetune.rows import read_rows
from finetune.speed import Budget

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from finetune.conversation import Sample
    from finetune.trainer import UpdateTrainer

GIB = 2**30
STATE_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "adafactor": 1}
# Share of the free memory that is planned with: the rest is for fragments, which grow as a run goes on.
USED_SHARE = 0.94
CPU_TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Method:
    """How a model is loaded for training, and what that is estimated to take."""

    name: str
    load: Callable[[Arguments, str, "torch.device"], "PreTrainedModel"]
    choose_budget: Callable[["Room"], Budget | None]
    predict_memory: Callable[["Room", Budget], dict[str, float]]
    flops_per_token: Callable[[Arguments, Shape], float]
    weight_bytes: int  # of a trained weight in a checkpoint
    tokens_per_second: Callable[["Room", Budget], float] | None = None


@dataclass(frozen=True)
class Room:
    """What a micro-batch budget is chosen for."""

    arguments: Arguments
    shape: Shape
    gpu: Any  # finetune.gpus.Gpu of this card, None where it is not known
    memory_bytes: float  # that may be used on this card
    world_size: int
    longest_row: int
    tokens_per_update: float
    lora_bytes: int  # of a LoRA weight
    optimizer_bytes: int  # of its optimiser state
    width: int  # bytes of the numbers that are computed with


def is_first_rank() -> bool:
    """Whether this process prints and writes."""
    return os.environ.get("RANK", "0") in ("", "0")


def say(text: str) -> None:
    """Print a line to the log, on the first rank only."""
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


# ---- before the model ----


def rows_per_update(arguments: Arguments, world_size: int) -> int:
    """Rows of one optimiser update: per device x accumulation x devices."""
    train = arguments.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size


def run_identity(arguments: Arguments, world_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(what must be equal for a checkpoint to be continued, names of the digests in it for people)."""
    from finetune.identity import fingerprint

    model_dir, train_file = arguments.model.model_name_or_path, arguments.data.train_file
    digest = hashlib.sha256(Path(train_file).read_bytes()).hexdigest()
    identity = {
        "base_model": fingerprint(model_dir),
        "train_data": digest,
        "rows_per_update": rows_per_update(arguments, world_size),
    }
    values = arguments.as_dict()
    kept = "max_seq_length eval_split_percentage lora_rank lora_alpha lora_dropout learning_rate lr_scheduler_type"
    kept += " warmup_steps optim weight_decay max_grad_norm seed"
    identity.update({name: values[name] for name in kept.split()})
    names = {"base_model": f"{model_dir} ({identity['base_model'][:8]})", "train_data": f"{train_file} ({digest[:8]})"}
    return identity, names


def updates_in_all(arguments: Arguments, num_rows: int, per_update: int) -> int:
    """Updates that the run ends with."""
    train = arguments.train
    an_epoch = math.ceil(num_rows / per_update)
    return train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * an_epoch)


def compute_dtype(wants_bf16: bool) -> str:
    """bfloat16 on cards that compute in it, float16 on older ones, float32 on a CPU unless bfloat16 is asked for."""
    import torch

    if not torch.cuda.is_available():
        return "bfloat16" if wants_bf16 else "float32"
    # torch says that it supports bfloat16 on a V100 too: it emulates it.
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def training_arguments(arguments: Arguments, dtype: str) -> "TrainingArguments":
    """transformers' arguments, steps counted in updates. Joins the process group where there are several ranks."""
    import torch
    from transformers import TrainingArguments

    train, use_cpu = arguments.train, not torch.cuda.is_available()
    has_evaluation = bool(arguments.data.eval_file or arguments.data.eval_split_percentage)
    return TrainingArguments(
        output_dir=train.output_dir,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        optim=train.optim,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy=train.save_strategy,
        save_steps=train.save_steps,
        eval_strategy="steps" if has_evaluation else "no",
        eval_steps=(train.eval_steps or train.save_steps) if has_evaluation else None,
        metric_for_best_model="loss" if has_evaluation else None,
        seed=train.seed,
        fp16=dtype == "float16",
        bf16=bool(train.deepspeed) and dtype == "bfloat16",
        report_to=train.report_to,
        deepspeed=train.deepspeed,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and "LOCAL_RANK" in os.environ else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        log_level="error",
        log_level_replica="error",
    )


def load_samples(arguments: Arguments, tokenizer: "PreTrainedTokenizerBase") -> tuple[list["Sample"], list["Sample"]]:
    """(training rows, evaluation rows) encoded. Raises UserError when none is left."""
    from finetune.conversation import encode_rows

    data = arguments.data
    encoded = {}
    for name, path in (("training", data.train_file), ("evaluation", data.eval_file)):
        encoded[name] = []
        if path:
            encoded[name], report = encode_rows(tokenizer, read_rows(path), data.max_seq_length)
            if report.num_cut or report.num_dropped:
                say(
                    f"{path}: {report.num_cut} rows cut to {data.max_seq_length} tokens, {report.num_dropped} dropped "
                    "(no supervised token was left)"
                )
            if not encoded[name]:
                raise UserError(f"{path}: no row is left at max_seq_length {data.max_seq_length}. Raise it.")
    training, evaluation = encoded["training"], encoded["evaluation"]
    if data.eval_split_percentage and not data.eval_file:
        training, evaluation = split_rows(training, data.eval_split_percentage, arguments.train.seed)
    return training, evaluation


def split_rows(samples: Sequence["Sample"], percentage: float, seed: int) -> tuple[list["Sample"], list["Sample"]]:
    """(rest, held out): `percentage` of the rows, at least one, the same for the same seed."""
    import random

    if percentage >= 100:
        raise UserError(f"eval_split_percentage must be below 100, found {percentage}.")
    held_out = set(random.Random(seed).sample(range(len(samples)), max(1, round(len(samples) * percentage / 100))))
    rest = [sample for index, sample in enumerate(samples) if index not in held_out]
    if not rest:
        raise UserError("eval_split_percentage leaves no row to train on. Lower it.")
    return rest, [samples[index] for index in sorted(held_out)]


# ---- memory ----


def usable_memory() -> float:
    """Bytes of this card (of main memory on a CPU) that the run may use, what it holds already included."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return (free + torch.cuda.memory_reserved()) * USED_SHARE
    return (saving.free_host_memory() or 8 * GIB) * USED_SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def this_gpu() -> Any:
    """The card of this process in finetune.gpus, or None."""
    import torch

    from finetune.gpus import found_gpu

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found_gpu(properties.name, properties.total_memory / GIB)


def decide_budget(method: Method, room: Room) -> Budget:
    """Budget: what the JSON fixes, else the fastest that fits. Raises UserError if none does."""
    train, layers = room.arguments.train, room.shape.layers
    wanted = train.tokens_per_micro_batch
    if room.gpu is None and train.recompute_layers < 0:
        return Budget(max(wanted or CPU_TOKEN_BUDGET, 1), layers)
    budget = method.choose_budget(room)
    if budget is None:
        raise UserError(
            f"a row of {room.longest_row} tokens does not fit into {room.memory_bytes / GIB:.1f} GiB even with every "
            "layer recomputed. Lower max_seq_length or lora_rank, or take a larger card (`make qwen-plan`)."
        )
    return budget


# ---- the run ----


def run_training(arguments: Arguments, method: Method) -> int:
    """Train and return the exit status: 0 done (now or before), 143 or 130 stopped by a signal and saved.

    Raises UserError for whatever the person can mend.
    """
    # Before torch is imported: against fragmentation, which grows with micro-batches of changing size.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for notice in arguments.notices:
        say(f"note: {notice}")
    require(
        arguments,
        model_name_or_path="Set it in the JSON file or pass --model_name_or_path (QWEN_MODEL_DIR in .env).",
        train_file="Set it in the JSON file or pass --train_file.",
        output_dir="Set it in the JSON file or pass --output_dir.",
    )
    from finetune.models import check_model_dir

    model_dir = check_model_dir(arguments.model.model_name_or_path)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    read_rows(arguments.data.train_file)
    identity, names = run_identity(arguments, world_size)
    output_dir = Path(arguments.train.output_dir)
    saving.check_same_run(output_dir, identity, names)
    finished = saving.read_marker(output_dir / "final") or {}
    if finished.get("updates_planned") and _planned(arguments, finished) <= finished["step"]:
        if is_first_rank():
            print(
                f"already done: {output_dir / 'final'} ({finished['step']} updates). "
                "Remove it or name another --output_dir to train again."
            )
        return 0
    return _train(arguments, method, model_dir, identity, names)


def _quieten() -> None:
    """Keep out of the log what other packages print and nobody can act on; carriage returns among it."""
    import warnings

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    unwanted = (".*is_gradient_checkpointing.*", ".*gradient_checkpointing.*deprecated", ".*broadcast_buffers.*")
    for text in (*unwanted, "Paged optimizers are not"):
        warnings.filterwarnings("ignore", message=text)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns that it found none


def _planned(arguments: Arguments, finished: dict[str, Any]) -> int:
    """Updates this run would end with, by the number of rows that the finished one had."""
    return updates_in_all(arguments, finished["rows"], finished["identity"]["rows_per_update"])


def _train(
    arguments: Arguments, method: Method, model_dir: Path, identity: dict[str, Any], names: dict[str, str]
) -> int:
    import json

    import torch
    from transformers import AutoTokenizer, set_seed

    from finetune.qlora import checkpoint_layers

    _quieten()
    dtype = compute_dtype(arguments.train.bf16)
    if arguments.train.optim.startswith("paged_") and not torch.cuda.is_available():
        say(
            f"note: {arguments.train.optim} pages nothing on a CPU: its state is in main memory, the update is the same"
        )
    if arguments.train.fp16 and dtype != "float16":
        say(f"note: fp16 is true, {dtype} is used: " + ("this is a CPU" if dtype == "float32" else "the card has it"))
    args = training_arguments(arguments, dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    samples, evaluation = load_samples(arguments, tokenizer)
    set_seed(args.seed)
    say(f"loading {model_dir}")
    model = method.load(arguments, dtype, args.device)
    shape = shape_of_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    width = getattr(torch, dtype).itemsize
    room = _room(arguments, shape, model, samples, args.world_size, identity["rows_per_update"], width)
    budget = decide_budget(method, room)
    checkpoint_layers(model, shape.layers - budget.layers_kept)
    last_update = updates_in_all(arguments, len(samples), identity["rows_per_update"])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _check_saving(arguments, method, room, trainable, bool(evaluation))
    trainer = _build_trainer(
        arguments,
        method,
        args,
        model,
        tokenizer,
        samples,
        evaluation,
        budget,
        shape,
        identity,
        names,
        room,
        last_update,
    )
    _print_plan(arguments, method, room, budget, trainer, len(samples), last_update, trainable, tokenizer)
    return _run(arguments, method, trainer, room, budget, last_update)


def _room(
    arguments: Arguments,
    shape: Shape,
    model: Any,
    samples: Sequence["Sample"],
    world_size: int,
    per_update: int,
    width: int,
) -> Room:
    lengths = [len(sample.input_ids) for sample in samples]
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    return Room(
        arguments=arguments,
        shape=shape,
        gpu=this_gpu(),
        memory_bytes=usable_memory(),
        world_size=world_size,
        longest_row=max(lengths),
        tokens_per_update=sum(lengths) / len(lengths) * min(per_update, len(lengths)),
        lora_bytes=trained.element_size() if trained is not None else 2,
        optimizer_bytes=STATE_BYTES.get(arguments.train.optim, 8),
        width=width,
    )


def _check_saving(arguments: Arguments, method: Method, room: Room, trainable: int, has_best: bool) -> None:
    """Disk for all checkpoints and main memory for one, before the first update."""
    if is_first_rank():
        one = saving.checkpoint_bytes(trainable, method.weight_bytes, room.optimizer_bytes)
        saving.check_host_memory(one, "saving a checkpoint")
        final = saving.checkpoint_bytes(trainable, method.weight_bytes, 0)
        output_dir = arguments.train.output_dir
        existing = len(saving.list_checkpoints(output_dir))
        saving.check_disk(
            output_dir, saving.disk_needed(one, final, arguments.train.save_total_limit, has_best, existing)
        )


def _build_trainer(
    arguments: Arguments,
    method: Method,
    args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: list["Sample"],
    evaluation: list["Sample"],
    budget: Budget,
    shape: Shape,
    identity: dict[str, Any],
    names: dict[str, str],
    room: Room,
    last_update: int,
) -> "UpdateTrainer":
    from transformers.trainer_callback import PrinterCallback

    from finetune.progress import Meter, ProgressCallback
    from finetune.report import write_json
    from finetune.trainer import RunPlan, UpdateTrainer

    def finish_folder(folder: Path) -> None:
        write_json(folder / "train_args.json", arguments.as_dict())
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
        if folder.name == "final":
            tokenizer.save_pretrained(folder)

    plan = RunPlan(
        rows_per_update=identity["rows_per_update"],
        token_budget=budget.tokens,
        identity=identity,
        names=names,
        record={"rows": len(samples), "updates_planned": last_update},
        save_total_limit=arguments.train.save_total_limit,
        finish_folder=finish_folder,
        eval_samples=evaluation,
    )
    meter = Meter(
        flops_per_token=method.flops_per_token(arguments, shape),
        peak_flops=room.gpu.peak_tflops * 1e12 * room.world_size if room.gpu else None,
        price_per_hour=float(os.environ.get("PRICE_PER_HOUR") or 0),
    )
    trainer = UpdateTrainer(model=model, args=args, samples=samples, plan=plan, meter=meter)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(trainer, meter))
    return trainer


def _print_plan(
    arguments: Arguments,
    method: Method,
    room: Room,
    budget: Budget,
    trainer: "UpdateTrainer",
    num_rows: int,
    last_update: int,
    trainable: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    from finetune.progress import clock, decoded_sample, size_text

    data = trainer.train_dataset
    tokens = last_update * room.tokens_per_update
    say(
        f"plan: {num_rows:,} rows of {sum(data.lengths) / num_rows:.0f} tokens on average "
        f"({sum(data.supervised) / sum(data.lengths):.0%} supervised), {last_update:,} updates of "
        f"{trainer.plan.rows_per_update} rows, {tokens:,.0f} tokens"
    )
    say(f"  trained: {trainable:,} parameters of {room.shape.parameters:,} ({method.name})")
    kept = f"{budget.layers_kept} of {room.shape.layers} layers not recomputed"
    say(f"  micro-batches: at most {budget.tokens:,} tokens, {kept}")
    parts = method.predict_memory(room, budget)
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    where = room.gpu.name if room.gpu else "main memory, besides the program's own"
    say(f"  memory: about {size_text(total(parts))} of {size_text(room.memory_bytes)}, {where} ({listed})")
    if room.gpu and method.tokens_per_second:
        seconds = tokens / (method.tokens_per_second(room, budget) * room.world_size)
        say(f"  time: about {clock(seconds)}, cost about {trainer.meter.cost(seconds):.2f}")
    else:
        say("  time: known after the first updates (`eta`)")
    say(f"one row as the model sees it, supervised parts in [[ ]] (line {data.samples[0].row}):")
    say(decoded_sample(tokenizer, data.samples[0]))


def _run(
    arguments: Arguments, method: Method, trainer: "UpdateTrainer", room: Room, budget: Budget, last_update: int
) -> int:
    status = "stopped by an error"
    try:
        number = trainer.run()
        if number:
            status = "interrupted"
            if arguments.train.save_strategy == "no":
                say("save_strategy is no: nothing was saved")
            return 128 + number
        final = trainer.save_final()
        status = "finished"
        if is_first_rank():
            print(f"done: {final}")
        return 0
    finally:
        if is_first_rank():
            _write_report(arguments, method, trainer, room, budget, last_update, status)
        if status != "stopped by an error":
            _leave_group()


def _leave_group() -> None:
    """Ranks part in order; one that just exits may make another one's last collective fail."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _write_report(
    arguments: Arguments,
    method: Method,
    trainer: "UpdateTrainer",
    room: Room,
    budget: Budget,
    last_update: int,
    status: str,
) -> None:
    import torch

    from finetune import report

    trainer.mark_time()
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    numbers = report.run_numbers(trainer.progress, trainer.meter, trainer.state.global_step, last_update)
    parts = method.predict_memory(room, budget)
    if arguments.train.optim.startswith("paged_"):
        parts.pop("optimizer")  # it lies outside the allocator whose peak is measured
    predicted = {"peak_memory_gib": round(total(parts) / GIB, 2)}
    if room.gpu and method.tokens_per_second:
        predicted["tokens_per_second"] = round(method.tokens_per_second(room, budget) * room.world_size, 1)
    output_dir = Path(arguments.train.output_dir)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    content = {
        "status": status,
        "method": method.name,
        **numbers,
        "predicted": predicted,
        "token_budget": trainer.token_budget,
        "layers_not_recomputed": budget.layers_kept,
        "devices": f"{room.world_size} x {device}",
        "identity": trainer.plan.identity,
        "names": trainer.plan.names,
        "config_file": arguments.config_file,
        "config": arguments.as_dict(),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "git_commit": report.git_commit(Path(__file__).parent),
        "versions": report.versions(),
        "history": history,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    report.write_json(output_dir / "train_report.json", content)
    if history:
        report.draw_losses(history, output_dir / "loss.png", f"{output_dir.name} ({status})")
        say(f"report: {output_dir / 'train_report.json'}, {output_dir / 'loss.png'}")
