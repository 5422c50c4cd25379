"""How much room a run has and how it is used: memory of this card, micro-batch budget, disk and memory to save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import saving
from finetune.adamw import PAGED_ADAMW
from finetune.arguments import Arguments
from finetune.errors import UserError
from finetune.gpus import GIB, USED_SHARE, Gpu, found_gpu
from finetune.memory import ADAM_STATE_BYTES, STATE_BYTES, Shape, total
from finetune.speed import Budget
from finetune.zero import local_ranks, parameter_count

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from finetune.conversation import Sample

CPU_TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Room:
    """What a micro-batch budget is chosen for. Memory and tokens are those of one card and one update."""

    arguments: Arguments
    shape: Shape
    gpu: Gpu | None  # None on a CPU and on a card that is not in the table
    memory_bytes: float
    world_size: int
    longest_row: int
    tokens_per_update: float
    trainable: int  # parameters
    trained_bytes: int  # of one of them
    width: int  # bytes of the numbers that are computed with

    @property
    def state_bytes(self) -> int:
        """Optimiser state of a trained parameter."""
        return STATE_BYTES.get(self.arguments.train.optim, ADAM_STATE_BYTES)


@dataclass(frozen=True)
class Method:
    """A way of training: how the model is loaded and what it takes. finetune.methods has them."""

    name: str
    load: Callable[[Arguments, "torch.dtype", "torch.device"], "PreTrainedModel"]
    choose_budget: Callable[[Room], Budget | None]
    predict_memory: Callable[[Room, Budget, int], dict[str, float]]  # the last: micro-batches of an update on a card
    flops_per_token: Callable[[Room], float]
    tokens_per_second: Callable[[Room, Budget], float]  # of one card
    saved_bytes: Callable[[Room], tuple[int, int, int]]  # a checkpoint, final/, main memory while saving
    # transformers' optimizer_cls_and_kwargs, None for what `optim` names
    optimizer: Callable[[Arguments, "torch.dtype"], tuple[type, dict[str, Any]] | None] = lambda *_: None
    stage: str = "none"  # DeepSpeed's
    finish_final: Callable[[Path], None] | None = None  # changes final/ before it is published
    record: dict[str, Any] = field(default_factory=dict)  # goes into every marker


def measure_room(
    arguments: Arguments,
    shape: Shape,
    model: "PreTrainedModel",
    samples: "Sequence[Sample]",
    world_size: int,
    rows_per_update: int,
    width: int,
) -> Room:
    """The room of this process, its model loaded."""
    lengths = [len(sample.input_ids) for sample in samples]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Room(
        arguments=arguments,
        shape=shape,
        gpu=_this_gpu(),
        memory_bytes=_agreed(_usable_memory(arguments.train.memory_limit_gib)),
        world_size=world_size,
        longest_row=max(lengths),
        tokens_per_update=sum(lengths) / len(lengths) * min(rows_per_update, len(lengths)),
        trainable=sum(map(parameter_count, trained)),
        trained_bytes=trained[0].element_size(),
        width=width,
    )


def _usable_memory(limit_gib: float) -> float:
    """Bytes of this card (of main memory on a CPU) that the run may use, what it holds already included.

    A limit holds for what torch's allocator takes from here on: beyond it the run is out of memory.
    """
    import torch

    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        usable = (free + torch.cuda.memory_reserved()) * USED_SHARE
        if limit_gib:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / whole))
            usable = min(usable, limit_gib * GIB * USED_SHARE)
        return usable
    return (saving.free_host_memory() or 8 * GIB) * USED_SHARE / local_ranks()


def _agreed(memory_bytes: float) -> float:
    """The least of all ranks: they must cut an update into the same micro-batches."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return memory_bytes
    least = torch.tensor(memory_bytes, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


def _this_gpu() -> Gpu | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found_gpu(properties.name, properties.total_memory / GIB)


def decide_budget(method: Method, room: Room) -> Budget:
    """Budget that the JSON fixes, else the fastest that fits. Raises UserError where none does.

    On a CPU and on an unknown card no memory is counted: recompute_layers and gradient_checkpointing decide alone.
    """
    train, layers = room.arguments.train, room.shape.layers
    if room.gpu is None:
        recomputed = max(0, train.recompute_layers) if train.gradient_checkpointing else 0
        return Budget(train.tokens_per_micro_batch or CPU_TOKEN_BUDGET, max(0, layers - recomputed))
    budget = method.choose_budget(room)
    if budget is None and train.tokens_per_micro_batch > room.longest_row:
        raise UserError(
            f"tokens_per_micro_batch {train.tokens_per_micro_batch} does not fit into {room.memory_bytes / GIB:.1f} "
            "GiB. Lower it, or set it to 0: then what fits is found."
        )
    if budget is None:
        raise UserError(
            f"a row of {room.longest_row} tokens does not fit into {room.memory_bytes / GIB:.1f} GiB even with every "
            "layer recomputed. Lower max_seq_length or lora_rank, set gradient_checkpointing to true, or take a larger "
            "card (`make qwen-plan`, `make baichuan-plan`)."
        )
    return budget


def predicted_parts(method: Method, room: Room, layers_kept: int, largest: Mapping[int, int]) -> dict[str, float]:
    """Bytes of that update which takes most; `largest` as UpdateDataset.largest_micro_batches counts."""
    cases = (method.predict_memory(room, Budget(tokens, layers_kept), count) for count, tokens in largest.items())
    return max(cases, key=total)


def predicted_peak(room: Room, parts: Mapping[str, float]) -> float:
    """Bytes that torch's allocator should report as its peak: a paged optimiser's state lies outside it."""
    is_outside = room.arguments.train.optim.startswith("paged_") and room.arguments.train.optim != PAGED_ADAMW
    return total({name: size for name, size in parts.items() if not (is_outside and name == "optimizer")})


def check_saving(method: Method, room: Room, has_best: bool) -> None:
    """Raises UserError unless there is disk for all checkpoints of the run and main memory for one."""
    train = room.arguments.train
    one, final, in_memory = method.saved_bytes(room)
    if train.save_strategy == "no":
        one = 0
    existing = sum(saving.is_complete(path) for _, path in saving.list_checkpoints(train.output_dir))
    saving.check_host_memory(in_memory, "saving a checkpoint")
    needed = saving.disk_needed(one, final, train.save_total_limit, has_best, existing)
    saving.check_disk(train.output_dir, needed)
