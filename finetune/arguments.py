"""What an experiment is: a JSON file and command-line flags become four dataclasses.

    python -m qwen_qlora.train_qlora --train_args_file qwen_qlora/config/qwen-14b-qlora.json --learning_rate 1e-4

A flag beats the JSON file, the JSON file beats the default. Every key of the file must be a field of one of the
dataclasses: an unknown or mistyped one is refused with the nearest name. Nothing heavy is imported here, so `--help`
answers at once.
"""

import argparse
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from finetune.errors import UserError
from finetune.json_files import read_json_object

USUAL_LORA_DROPOUT = 0.05
MAX_PLAUSIBLE_DROPOUT = 0.3
# `adamw_hf` was the name of transformers' own AdamW, removed in 5.0; torch's is the same update rule.
RENAMED_OPTIMIZERS = {"adamw_hf": "adamw_torch"}
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adafactor",
    "sgd",
)
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "polynomial",
    "inverse_sqrt",
)


def _option(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices, "at_least": at_least, "below": below})


@dataclass(frozen=True)
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = _option(None, "folder of the native base checkpoint (make qwen-download)")


@dataclass(frozen=True)
class DataArguments:
    """What it is trained on."""

    train_file: str | None = _option(None, ".jsonl file of training rows")
    eval_file: str | None = _option(None, ".jsonl file of rows whose loss is measured while training")
    eval_split_percentage: float = _option(
        0.0, "without eval_file: percent of training rows held out", at_least=0, below=100
    )
    max_seq_length: int = _option(1024, "tokens; a longer row is cut so that supervised tokens remain", at_least=8)


@dataclass(frozen=True)
class LoraArguments:
    """The low-rank update: weight + lora_alpha / lora_rank * B A on all seven projections."""

    lora_rank: int = _option(64, "rank of A and B", at_least=1)
    lora_alpha: float = _option(16, "scale of the update, divided by lora_rank", at_least=0)
    lora_dropout: float = _option(USUAL_LORA_DROPOUT, "dropout before A", at_least=0)
    fp8_backward: bool = _option(False, "FP8 for the backward products with the frozen base (Ada, Hopper)")


@dataclass(frozen=True)
class TrainArguments:
    """How it is trained. Steps are optimiser updates everywhere."""

    output_dir: str | None = _option(None, "folder of checkpoints, curves, report and final/")
    num_train_epochs: float = _option(1.0, "passes over the rows", at_least=0)
    max_steps: int = _option(-1, "updates to do, whatever the epochs (-1 = by num_train_epochs)", at_least=-1)
    per_device_train_batch_size: int = _option(8, "rows; rows of an update = this x accumulation x devices", at_least=1)
    gradient_accumulation_steps: int = _option(1, "see per_device_train_batch_size", at_least=1)
    learning_rate: float = _option(5e-5, "peak learning rate", at_least=0)
    lr_scheduler_type: str = _option("constant_with_warmup", "shape of the learning rate", choices=SCHEDULES)
    warmup_steps: int = _option(0, "updates until the peak learning rate", at_least=0)
    optim: str = _option("paged_adamw_32bit", "optimiser", choices=OPTIMIZERS + tuple(RENAMED_OPTIMIZERS))
    weight_decay: float = _option(0.0, "of matrices", at_least=0)
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm (0 = never)", at_least=0)
    logging_steps: int = _option(10, "updates between two lines of the log", at_least=1)
    save_strategy: str = _option("steps", "when checkpoints are written", choices=("steps", "epoch", "no"))
    save_steps: int = _option(500, "updates between two checkpoints", at_least=1)
    save_total_limit: int = _option(1, "newest checkpoints kept; the best one is kept besides", at_least=1)
    eval_steps: int = _option(0, "updates between two measurements of the evaluation loss (0 = save_steps)", at_least=0)
    gradient_checkpointing: bool = _option(True, "recompute layers that do not fit in memory (false = none)")
    recompute_layers: int = _option(-1, "layers recomputed in the backward pass (-1 = as few as fit)", at_least=-1)
    tokens_per_micro_batch: int = _option(0, "token budget of one forward pass (0 = what fits)", at_least=0)
    memory_limit_gib: float = _option(0, "GiB of the card that the run may use (0 = all)", at_least=0)
    seed: int = _option(42, "of the data order and the dropout", at_least=0)
    fp16: bool = _option(False, "16-bit computation; bfloat16 where the device has it")
    bf16: bool = _option(False, "bfloat16 computation, also on a CPU")
    report_to: str = _option("none", "where curves go besides loss.png", choices=("none", "tensorboard"))
    dataloader_num_workers: int = _option(0, "not needed: rows are encoded once and stay in memory", at_least=0)
    deepspeed: str | None = _option(None, "DeepSpeed configuration file (none = without DeepSpeed)")
    local_rank: int = _option(-1, "set by launchers", at_least=-1)


ROOMS = (ModelArguments, DataArguments, LoraArguments, TrainArguments)
Room = TypeVar("Room")


@dataclass(frozen=True)
class Arguments:
    """One experiment: the four rooms, the file they came from and remarks for the log."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    train: TrainArguments
    config_file: str | None = None
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Every key with the value used, as a JSON file would hold them."""
        rooms = (self.model, self.data, self.lora, self.train)
        return {item.name: getattr(room, item.name) for room in rooms for item in fields(room)}


def nearest(name: str, names: Sequence[str]) -> str:
    """` (did you mean ...?)` for the nearest known name, or an empty string."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean `{matches[0]}`?)" if matches else ""


def _all_fields() -> dict[str, Field]:
    return {item.name: item for room in ROOMS for item in fields(room)}


def _plain_type(item: Field) -> type:
    """The one type of a field: `str | None` -> str."""
    if isinstance(item.type, types.UnionType):
        return next(kind for kind in typing.get_args(item.type) if kind is not type(None))
    return item.type


def _refuse_duplicates(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: the key `{twice}` stands there twice. Keep one.")
    return dict(pairs)


def _read_json(path: str) -> dict[str, Any]:
    advice = "Name an existing JSON file."
    return read_json_object(path, "--train_args_file", advice, partial(_refuse_duplicates, path))


def _check_json_value(where: str, item: Field, value: Any) -> Any:
    kind = _plain_type(item)
    if value is None and item.default is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == int(value):
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}[kind]
    remedy = " Remove the quotes." if isinstance(value, str) else ""
    raise UserError(f"{where} must be {wanted}, found {json.dumps(value, ensure_ascii=False)}.{remedy}")


def _values_of_json(path: str) -> dict[str, Any]:
    known, values = _all_fields(), {}
    for name, value in _read_json(path).items():
        if name not in known:
            raise UserError(f"{path}: unknown key `{name}`{nearest(name, list(known))}.")
        values[name] = _check_json_value(f"{path}: `{name}`", known[name], value)
        _check_range(f"{path}: `{name}`", known[name], values[name])
    return values


def _check_range(where: str, item: Field, value: Any) -> None:
    choices, at_least, below = (item.metadata[key] for key in ("choices", "at_least", "below"))
    if choices and value not in choices:
        raise UserError(f"{where} must be one of {', '.join(choices)}, found `{value}`{nearest(str(value), choices)}.")
    if at_least is not None and not value >= at_least:
        raise UserError(f"{where} must be at least {at_least}, found {value}.")
    if isinstance(value, float) and not math.isfinite(value) and item.name != "max_grad_norm":  # inf: no limit
        raise UserError(f"{where} must be a finite number, found {value}.")
    if below is not None and not value < below:
        raise UserError(f"{where} must be below {below}, found {value}.")


def bool_(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}. See --help.")


def _build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--train_args_file", metavar="JSON", help="the experiment; flags below beat it")
    for room in ROOMS:
        group = parser.add_argument_group(room.__doc__.splitlines()[0])
        for item in fields(room):
            kind = bool_ if _plain_type(item) is bool else _plain_type(item)
            text = f"{item.metadata['help']} [{item.default}]".replace("%", "%%")
            names = [f"--{item.name}"] + (["--local-rank"] if item.name == "local_rank" else [])
            group.add_argument(
                *names, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.strip("_"), help=text
            )
    return parser


def _settle(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Old names replaced and doubtful values remarked upon: (values, notices)."""
    notices = []
    optimizer = values.get("optim")
    if optimizer in RENAMED_OPTIMIZERS:
        values = {**values, "optim": RENAMED_OPTIMIZERS[optimizer]}
        notices.append(f"optim {optimizer} is gone from transformers: {values['optim']} is used, the same update rule")
    if values.get("deepspeed") in ("", "none"):
        values = {**values, "deepspeed": None}
    dropout = values.get("lora_dropout", USUAL_LORA_DROPOUT)
    if dropout >= 1:
        raise UserError(f"lora_dropout must be below 1, found {dropout}. The usual value is {USUAL_LORA_DROPOUT}.")
    if dropout > MAX_PLAUSIBLE_DROPOUT:
        notices.append(f"lora_dropout {dropout} is unusually high: the usual value is {USUAL_LORA_DROPOUT}")
    if values.get("fp16") and values.get("bf16"):
        raise UserError("fp16 and bf16 are both true. Keep one.")
    if values.get("dataloader_num_workers"):
        notices.append("dataloader_num_workers is not needed: rows are encoded once and stay in memory")
    return values, notices


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> Arguments:
    """The experiment of a command line.

    Raises UserError for an unknown flag or key, a value of the wrong type or out of range, an unreadable JSON file.
    """
    parser = _build_parser(description)
    namespace, unknown = parser.parse_known_args(argv)
    flags = vars(namespace)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        raise UserError(f"unknown argument {unknown[0]}{nearest(name, list(_all_fields()))}. See --help.")
    config_file = flags.pop("train_args_file", None)
    for name, value in flags.items():
        _check_range(f"--{name}", _all_fields()[name], value)
    values = _values_of_json(config_file) if config_file else {}
    values, notices = _settle({**values, **flags})
    rooms = [room(**{f.name: values[f.name] for f in fields(room) if f.name in values}) for room in ROOMS]
    return Arguments(*rooms, config_file=config_file, notices=tuple(notices))


def require(arguments: Arguments, **remedies: str) -> None:
    """Raises UserError for the first named key without a value; each remedy says what to do about it."""
    values = arguments.as_dict()
    for name, remedy in remedies.items():
        if not values[name]:
            raise UserError(f"`{name}` is not set. {remedy}")
