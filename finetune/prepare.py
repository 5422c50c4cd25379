"""What a run needs before its model: who it is, transformers' arguments, encoded rows."""

import hashlib
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adamw import PAGED_ADAMW
from finetune.arguments import Arguments
from finetune.errors import UserError, is_full_disk
from finetune.models import refuse_unseen_card
from finetune.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from finetune.conversation import Sample

# Besides the weights, the rows and the rows of an update: what a checkpoint cannot be continued with a change of.
SAME_ALL_ALONG = (
    "max_seq_length eval_split_percentage lora_rank lora_alpha lora_dropout fp8_backward learning_rate "
    "lr_scheduler_type warmup_steps optim weight_decay max_grad_norm seed"
).split()


def is_first_rank() -> bool:
    """Whether this process prints and writes."""
    return os.environ.get("RANK", "0") in ("", "0")


def say(text: str) -> None:
    """Print a line to the log, on the first rank only."""
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


def rows_per_update(arguments: Arguments, world_size: int) -> int:
    """Rows of one optimiser update: per device x accumulation x devices."""
    train = arguments.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size


def run_identity(arguments: Arguments, world_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(what must be equal for a checkpoint to be continued, names of the digests in it for people)."""
    from finetune.identity import fingerprint

    model_dir, train_file = arguments.model.model_name_or_path, arguments.data.train_file
    base, data = fingerprint(model_dir), hashlib.sha256(Path(train_file).read_bytes()).hexdigest()
    values = arguments.as_dict()
    identity = {
        "base_model": base,
        "train_data": data,
        "rows_per_update": rows_per_update(arguments, world_size),
        **{name: values[name] for name in SAME_ALL_ALONG},
    }
    return identity, {"base_model": f"{model_dir} ({base[:8]})", "train_data": f"{train_file} ({data[:8]})"}


def updates_in_all(arguments: Arguments, num_rows: int, per_update: int) -> int:
    """Updates that the run ends with."""
    train = arguments.train
    an_epoch = math.ceil(num_rows / per_update)
    return train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * an_epoch)


def compute_dtype(wants_bf16: bool) -> str:
    """bfloat16 on cards that compute in it, float16 on older ones, float32 on a CPU unless bfloat16 is asked for.

    Raises UserError like refuse_unseen_card.
    """
    import torch

    refuse_unseen_card()
    if not torch.cuda.is_available():
        return "bfloat16" if wants_bf16 else "float32"
    # torch says that it supports bfloat16 on a V100 too: it emulates it.
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def explain_choices(arguments: Arguments, dtype: str) -> None:
    """Say in the log where this machine makes something else of the JSON's words."""
    import torch

    optimizer, is_cpu = arguments.train.optim, not torch.cuda.is_available()
    if optimizer == PAGED_ADAMW:
        say(f"note: {optimizer} is not paged: its state is in the plan below. One fused kernel, the same update")
    elif optimizer.startswith("paged_") and is_cpu:
        say(f"note: {optimizer} pages nothing on a CPU: its state is in main memory, the update is the same")
    if arguments.train.memory_limit_gib and is_cpu:
        say("note: memory_limit_gib concerns cards: this is a CPU")
    missing = [package for package in ("triton", "liger_kernel") if not is_cpu and find_spec(package) is None]
    if missing:
        what = "slower, and more memory than planned. make doctor tells how to complete the environment"
        say(f"note: {' and '.join(missing)} not installed: {what}")
    if arguments.train.fp16 and dtype != "float16":
        say(f"note: fp16 is true, {dtype} is used: {'this is a CPU' if is_cpu else 'the card has it'}")


def quieten() -> None:
    """Keep out of the log what other packages print and nobody can act on, carriage returns among it."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    unwanted = (".*is_gradient_checkpointing.*", ".*gradient_checkpointing.*deprecated", ".*broadcast_buffers.*")
    others = ("Paged optimizers are not", "`torch.distributed.*is deprecated", r"barrier\(\): using the device")
    for text in (*unwanted, *others):
        warnings.filterwarnings("ignore", message=text)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns that it found none


def check_output_dir(output_dir: str | Path) -> None:
    """Make the folder, where it is not there yet. Raises UserError when it cannot be made or written to."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if is_full_disk(error):
            raise
        in_the_way = [path for path in (folder, *folder.parents) if os.path.lexists(path) and not os.path.isdir(path)]
        found = f"{in_the_way[0]}, which is not a folder" if in_the_way else error.strerror
        raise UserError(
            f"{output_dir}: expected a folder to write checkpoints to, found: {found}. "
            "Name another with --output_dir, or QWEN_OUTPUT_DIR or BAICHUAN_OUTPUT_DIR in .env."
        ) from None


def on_first_rank(check: Callable[[], None]) -> None:
    """Call it there; the UserError it raises is raised on all ranks, so that none waits for another in vain."""
    import torch.distributed as dist

    problem: list[str | None] = [None]
    if is_first_rank():
        try:
            check()
        except UserError as error:
            problem = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])


def check_shared_folder(output_dir: str | Path) -> None:
    """Raises UserError when ranks on other machines do not see what the first one writes to output_dir."""
    import torch.distributed as dist

    from finetune.zero import local_ranks

    if not dist.is_initialized() or dist.get_world_size() <= local_ranks():
        return
    name = [f".shared-{os.getpid()}-{random.randrange(2**32)}" if is_first_rank() else None]
    dist.broadcast_object_list(name)
    mark = Path(output_dir) / name[0]
    if is_first_rank():
        mark.touch()
    dist.barrier()
    seen: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, mark.exists())
    if is_first_rank():
        mark.unlink()
    if not all(seen):
        raise UserError(
            f"{output_dir} is not the same folder on all machines: rank {seen.index(False)} does not see the first "
            "rank's files. Name an --output_dir on a file system that they share."
        )


def training_arguments(arguments: Arguments, dtype: str) -> "TrainingArguments":
    """transformers' arguments, steps counted in updates. Joins the process group where there are several ranks.

    Raises UserError where one process sees several cards: transformers would deal a batch's rows out to them.
    """
    import torch
    from transformers import TrainingArguments

    if (cards := torch.cuda.device_count()) > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"one process sees {cards} cards. `make qwen-train` and `make baichuan-train` start a process for each; to "
            "train on one card: CUDA_VISIBLE_DEVICES=0"
        )
    train, use_cpu = arguments.train, not torch.cuda.is_available()
    as_they_are = (
        "output_dir num_train_epochs max_steps per_device_train_batch_size learning_rate lr_scheduler_type "
        "warmup_steps optim weight_decay max_grad_norm logging_steps save_strategy save_steps seed report_to deepspeed"
    ).split()
    evaluation = {}
    if arguments.data.eval_file or arguments.data.eval_split_percentage:
        evaluation = {"eval_strategy": "steps", "eval_steps": train.eval_steps or train.save_steps}
        evaluation["metric_for_best_model"] = "loss"
    return TrainingArguments(
        **{name: getattr(train, name) for name in as_they_are},
        **evaluation,
        gradient_accumulation_steps=1,
        logging_nan_inf_filter=False,
        fp16=dtype == "float16",
        bf16=bool(train.deepspeed) and dtype == "bfloat16",
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


def _encode(path: str | None, tokenizer: "PreTrainedTokenizerBase", max_seq_length: int) -> list["Sample"]:
    from finetune.conversation import encode_rows

    if not path:
        return []
    samples, report = encode_rows(tokenizer, read_rows(path), max_seq_length)
    if report.num_cut or report.num_dropped:
        dropped = f"{report.num_dropped} dropped: no supervised token was left"
        say(f"{path}: {report.num_cut} rows cut to {max_seq_length} tokens, {dropped}")
    if not samples:
        raise UserError(f"{path}: no row is left at max_seq_length {max_seq_length}. Raise it.")
    return samples


def load_samples(arguments: Arguments, tokenizer: "PreTrainedTokenizerBase") -> tuple[list["Sample"], list["Sample"]]:
    """(training rows, evaluation rows) encoded. Raises UserError when a file has none left."""
    data = arguments.data
    training = _encode(data.train_file, tokenizer, data.max_seq_length)
    evaluation = _encode(data.eval_file, tokenizer, data.max_seq_length)
    if data.eval_split_percentage and not evaluation:
        return split_rows(training, data.eval_split_percentage, arguments.train.seed)
    return training, evaluation


def split_rows(samples: Sequence["Sample"], percentage: float, seed: int) -> tuple[list["Sample"], list["Sample"]]:
    """(rest, held out): `percentage` of the rows, at least one, the same for the same seed."""
    held_out = set(random.Random(seed).sample(range(len(samples)), max(1, round(len(samples) * percentage / 100))))
    rest = [sample for index, sample in enumerate(samples) if index not in held_out]
    if not rest:
        raise UserError("eval_split_percentage leaves no row to train on. Lower it.")
    return rest, [samples[index] for index in sorted(held_out)]
