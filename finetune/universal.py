"""A DeepSpeed checkpoint made loadable by any number of ranks, without a copy of its numbers.

DeepSpeed loads its universal form on whatever ranks there are. Its own tool writes all states two and a half times to
get there: for 333 M parameters of two ranks 36 s and 5.6 GB, here 3 s and 1.5 MB.
"""

import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from finetune.countdown import Countdown
from finetune.errors import UserError
from finetune.zero import step_folder

if TYPE_CHECKING:
    import torch

UNIVERSAL = "latest_universal"  # the file by which DeepSpeed finds a universal checkpoint
ZERO = "optimizer_state_dict"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")  # a parameter in 32 bits and its moments, as DeepSpeed names them
FLOAT_BYTES, MB = 4, 1e6
# What torch, pickle and a look into a file of another layout raise.
NOT_READ = (AttributeError, EOFError, LookupError, OSError, RuntimeError, StopIteration, UnpicklingError, ValueError)
_READING: ContextVar[Countdown | None] = ContextVar("reading", default=None)


class Deferred:
    """Pickled it is a call: whoever loads the file gets what `function(*arguments)` returns there and then."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@dataclass
class Place:
    """Where a parameter's numbers lie: (file of a rank, group in it, first, how many) for each piece, in order."""

    shape: "torch.Size"
    pieces: list[tuple[str, int, int, int]] = field(default_factory=list)
    step: Any = None  # the counter of updates, where DeepSpeed wants one beside each parameter


def make_universal(checkpoint: Path, target: Path) -> int:
    """Write `target`, a checkpoint that any number of ranks can load, beside what transformers itself needs of it.

    It has the names and layout that DeepSpeed's own tool gives it, but no numbers: its files say where these lie in
    `checkpoint`, which must stay until `target` is loaded. The tool writes all states two and a half times.

    Returns the bytes of the states. Raises UserError when some are missing or torn.
    """
    try:
        step = step_folder(checkpoint.resolve())
        places = _write_universal(step, target / step.name)
        for name in ("trainer_state.json", "scheduler.pt"):
            shutil.copyfile(checkpoint / name, target / name)
    except NOT_READ as error:
        why = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{checkpoint} was written by another number of ranks and cannot be dealt out anew ({why}). "
            "Go on with as many cards as before, or name another --output_dir."
        ) from error
    finally:
        _loaded.cache_clear()
    (target / UNIVERSAL).write_text(step.name)
    return sum(FLOAT_BYTES * len(KINDS) * place.shape.numel() for place in places.values())


def _write_universal(step: Path, target: Path) -> dict[str, Place]:
    """The files of a universal checkpoint in `target`, which need those in `step`; where each parameter lies."""
    import torch

    files = sorted(step.glob("*_optim_states.pt"), key=lambda path: int(re.search(r"pp_rank_(\d+)", path.name)[1]))
    if not files:
        raise ValueError("no optimizer states")
    first = _loaded(str(files[0]))[ZERO]
    is_stage_3 = first.get("zero_stage", 1) == 3
    moments = (first[ZERO] if is_stage_3 else first["base_optimizer_state"])["state"].values()
    if not moments or not all(set(KINDS[1:]) <= set(state) for state in moments):
        raise ValueError("its optimiser is no AdamW in 32 bits")
    places = (_places_3 if is_stage_3 else _places_1_2)(step, [str(file) for file in files])
    for name, place in places.items():
        found = sum(count for *_, count in place.pieces)
        if found != place.shape.numel():
            raise ValueError(f"{name}: expected {place.shape.numel():,} numbers, found {found:,}")
        folder = target / "zero" / name
        folder.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            # The flat tensor in stage 3, else in its shape and in a dictionary.
            shape = place.shape.numel() if is_stage_3 else tuple(place.shape)
            value = Deferred(joined, kind, place.pieces, shape)
            torch.save(value if is_stage_3 else {"cat_dim": 0, "param": value}, folder / f"{kind}.pt")
        if place.step is not None:
            torch.save(place.step, folder / "step.pt")
    torch.save(_common_state(first), target / "zero" / "optimizer_state.pt")
    for path in step.glob("*_model_states.pt"):
        torch.save(Deferred(_loaded, str(path)), target / path.name)
    return places


def _places_3(step: Path, files: list[str]) -> dict[str, Place]:
    """Stage 3 deals each parameter out to all ranks in equal parts, the last one padded, and joins them by group."""
    found = {}
    for group, shapes in enumerate(_loaded(str(next(step.glob("*_model_states.pt"))))["param_shapes"]):
        first = 0
        for name, shape in shapes.items():
            part = math.ceil(shape.numel() / len(files))
            counts = [min(part, shape.numel() - rank * part) for rank in range(len(files))]
            pieces = [(file, group, first, count) for file, count in zip(files, counts, strict=True) if count > 0]
            found[name] = Place(shape, pieces)
            first += part
        for file in files:
            length = _loaded(file)[ZERO]["fp32_flat_groups"][group].numel()
            if length < first:
                raise ValueError(f"{Path(file).name}: expected {first:,} numbers, found {length:,}")
    return found


def _places_1_2(step: Path, files: list[str]) -> dict[str, Place]:
    """Stages 1 and 2 deal out a group's parameters as one flat tensor, and note what of each came to lie where."""
    shapes = _loaded(str(next(step.glob("*_model_states.pt"))))["param_shapes"]
    found = {name: Place(shape) for group in shapes for name, shape in group.items()}
    for file in files:
        states = _loaded(file)[ZERO]
        for group, fragments in enumerate(states["param_slice_mappings"]):
            for name, part in fragments.items():
                found[name].pieces.append((file, group, part.start, part.numel))
                found[name].step = states["base_optimizer_state"]["state"][group].get("step")
    return found


def _common_state(states: dict[str, Any]) -> dict[str, Any]:
    """What is no parameter's own: DeepSpeed loads it on every rank, so it is without the first rank's numbers."""
    if "param_slice_mappings" in states:
        sharded = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")
        common = {name: value for name, value in states.items() if name not in sharded}
        return common | {"param_groups": states["base_optimizer_state"]["param_groups"]}
    common = {name: value for name, value in states.items() if name != "fp32_flat_groups"}
    base = states[ZERO]
    steps = {group: {"step": state["step"]} for group, state in base["state"].items() if "step" in state}
    return common | {ZERO: {**base, "state": steps}, "param_groups": base["param_groups"]}


def joined(kind: str, pieces: list[tuple[str, int, int, int]], shape: int | tuple[int, ...]) -> "torch.Tensor":
    """A parameter's numbers of one of KINDS from the files of the ranks, of the given shape; a copy."""
    import torch

    countdown = _READING.get()
    if countdown and not countdown.done:
        countdown.start = time.monotonic()  # what DeepSpeed did since show_reading is no reading
    found = []
    for file, group, first, count in pieces:
        states = _loaded(file)[ZERO]
        if kind == "fp32":
            flat = (states.get("single_partition_of_fp32_groups") or states["fp32_flat_groups"])[group]
        else:
            flat = (states.get("base_optimizer_state") or states[ZERO])["state"][group][kind]
        found.append(flat.narrow(0, first, count))
    tensor = torch.cat(found).reshape(shape)
    if countdown:
        # Small tensors are rounded away, and a rank may read more than its share: end_reading tells the end, once.
        countdown.advance(max(0, min(round(tensor.nbytes / MB), countdown.total - 1 - countdown.done)))
    return tensor


@cache
def _loaded(file: str) -> Any:
    """A file of torch's; its numbers are read from the disk when they are used."""
    import torch

    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def show_reading(nbytes: float) -> None:
    """From now on print how much of a universal checkpoint's `nbytes` this process has read."""
    _READING.set(Countdown(max(1, round(nbytes / MB)), unit="MB"))


def end_reading() -> None:
    """A universal checkpoint is loaded: give its files back, which take disk as long as they are open."""
    _loaded.cache_clear()
    if countdown := _READING.get():
        countdown.advance(countdown.total - countdown.done)
    _READING.set(None)


def repair_universal(optimizer: "torch.optim.Optimizer", weight_decays: Sequence[float] = ()) -> None:
    """Undo what DeepSpeed (0.19.8) does wrong when it loads a universal checkpoint.

    Stage 3 gives all groups one and the same step counter, which then counts once a group, and the first group's decay
    (`weight_decays` are the right ones). All stages leave the counter in main memory, where the fused AdamW of a card
    does not look for it.
    """
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if hasattr(state.get("step"), "clone"):
            step = state["step"].clone()
            state["step"] = step.to(parameter.device) if is_fused else step
    for group, decay in zip(optimizer.param_groups, weight_decays, strict=False):
        group["weight_decay"] = decay
