"""The ways to run a training on given cards, with memory, budget and time of each: what finetune.plan prints.

Its remark on the warm-up is the training log's too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.arguments import Arguments, TrainArguments
from finetune.gpus import GIB, USED_SHARE, Gpu
from finetune.memory import (
    ADAM_STATE_BYTES,
    STAGES,
    STATE_BYTES,
    Shape,
    full_memory,
    host_memory,
    qlora_memory,
    total,
)
from finetune.speed import (
    UPDATES_DIFFER,
    Budget,
    choose_full_budget,
    choose_qlora_budget,
    filled,
    full_update_seconds,
    layers_allowed,
    micro_batches,
    qlora_tokens_per_second,
)

CONTEXT_GIB = 0.8  # CUDA context and libraries
WARMUP_SHARE = 0.03  # of the updates: the warm-up that is advised where it is too long


@dataclass(frozen=True)
class Workload:
    """The rows to train on and how often: `tokens` is the mean of a row; max_steps above 0 stands over epochs."""

    rows: int
    tokens: float
    epochs: float
    longest_row: int
    rows_per_update: int
    max_steps: int = -1

    @property
    def updates(self) -> int:
        """Optimiser updates in all."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.epochs * math.ceil(self.rows / self.rows_per_update))

    @property
    def tokens_in_all(self) -> float:
        """Trained tokens: an epoch's last update may be smaller than the others."""
        if self.max_steps > 0:
            return self.max_steps / math.ceil(self.rows / self.rows_per_update) * self.rows * self.tokens
        return self.epochs * self.rows * self.tokens

    @property
    def tokens_per_update(self) -> float:
        """Trained tokens of a full update."""
        return self.tokens * min(self.rows, self.rows_per_update)


@dataclass(frozen=True)
class Option:
    """One way to run it: bytes per card by part, seconds in all; budget None where not even one row fits."""

    name: str
    gpus: int
    parts: dict[str, float]
    budget: Budget | None
    seconds: float
    host_bytes: float = 0.0


def usable_bytes(gpu: Gpu, limit_gib: float = 0) -> float:
    """What a plan may use of a card, memory_limit_gib at most where that is set."""
    return min(gpu.memory_gib - CONTEXT_GIB, limit_gib or math.inf) * USED_SHARE * GIB


def _shown(budget: Budget | None, work: Workload, train: TrainArguments, layers: int) -> Budget:
    """The budget with what its largest micro-batch holds; without one, the least that the experiment allows."""
    least, _ = layers_allowed(train, layers) or (0, layers)
    budget = budget or Budget(train.tokens_per_micro_batch, least)
    return replace(budget, tokens=max(budget.tokens, work.longest_row))


def qlora_option(shape: Shape, gpu: Gpu, gpus: int, arguments: Arguments, work: Workload) -> Option:
    """QLoRA on so many cards, data parallel."""
    train, rank = arguments.train, arguments.lora.lora_rank
    state_bytes = STATE_BYTES.get(train.optim, ADAM_STATE_BYTES)
    budget = choose_qlora_budget(
        shape,
        rank,
        gpu,
        usable_bytes(gpu, train.memory_limit_gib),
        work.longest_row,
        work.tokens_per_update,
        gpus,
        optimizer_bytes=state_bytes,
        layers_kept=layers_allowed(train, shape.layers),
        tokens=train.tokens_per_micro_batch or None,
    )
    shown = _shown(budget, work, train, shape.layers)
    mean = filled(budget or shown, work.tokens_per_update / gpus)
    speed = qlora_tokens_per_second(shape, rank, gpu, mean, arguments.lora.fp8_backward) * gpus
    parts = qlora_memory(shape, rank, shown.tokens, shown.layers_kept, optimizer_bytes=state_bytes, gpus=gpus)
    return Option("qlora", gpus, parts, budget, work.tokens_in_all / speed)


def full_option(shape: Shape, gpu: Gpu, gpus: int, stage: str, train: TrainArguments, work: Workload) -> Option:
    """Full fine-tuning with a DeepSpeed stage; `none` is without, 16-bit weights and moments on each card."""
    budget = choose_full_budget(
        shape,
        stage,
        gpu,
        gpus,
        usable_bytes(gpu, train.memory_limit_gib),
        work.longest_row,
        work.tokens_per_update,
        layers_kept=layers_allowed(train, shape.layers),
        tokens=train.tokens_per_micro_batch or None,
    )
    shown = _shown(budget, work, train, shape.layers)
    cases = [(shown.tokens, 2)]  # as it was looked at: several micro-batches, all of them full
    if budget and micro_batches(shown, work.tokens_per_update / gpus) == 1:
        # Of one, mostly. An update larger than the budget is cut in two, and keeps gradients beside activations.
        half = math.ceil(shown.tokens * UPDATES_DIFFER / 2)
        cases = [(shown.tokens, 1), (max(half, min(work.longest_row, shown.tokens)), 2)]
    parts = max((full_memory(shape, stage, gpus, tokens, shown.layers_kept, n) for tokens, n in cases), key=total)
    updates = work.tokens_in_all / work.tokens_per_update
    seconds = updates * full_update_seconds(shape, gpu, budget or shown, stage, gpus, work.tokens_per_update)
    return Option(stage, gpus, parts, budget, seconds, host_memory(shape, stage))


def full_options(shape: Shape, gpu: Gpu, gpus: int, train: TrainArguments, work: Workload) -> list[Option]:
    """Every way on so many cards: 1 to 3 on several, none where the card has bfloat16, offloading always."""
    left_out = (() if gpus > 1 else ("1", "2", "3")) + (() if gpu.has_bf16 else ("none",))
    stages = [stage for stage in STAGES if stage not in left_out]
    return [full_option(shape, gpu, gpus, stage, train, work) for stage in stages]


def choose(options: Sequence[Option]) -> Option | None:
    """The fastest that fits; what is within 2 % of it counts as equal, and the first, simplest of those wins."""
    fitting = [option for option in options if option.budget]
    if not fitting:
        return None
    fastest = min(option.seconds for option in fitting)
    return next(option for option in fitting if option.seconds <= 1.02 * fastest)


def warmup_note(train: TrainArguments, updates: int) -> str | None:
    """What to say, in the plan and in the log, where more than half of the updates warm up; else None."""
    warmup = train.warmup_steps
    if train.lr_scheduler_type == "constant" or not 0 < updates < 2 * warmup:
        return None
    reached = "never reached" if warmup >= updates else "reached late"
    # The update after the warm-up is the first at the peak, so a single update can have no warm-up.
    advised = min(max(1, round(WARMUP_SHARE * updates)), updates - 1)
    return (
        f"note: {warmup:,} warmup_steps, {updates:,} updates: learning rate {train.learning_rate:g} is {reached}. "
        f'Train with ARGS="--warmup_steps {advised}", or on more rows'
    )


def counts(gpus: int) -> list[int]:
    """Numbers of cards worth a line: 1, 2, 4, 8 and the one asked for."""
    return sorted({1, 2, 4, 8, gpus})
