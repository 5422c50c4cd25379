"""The ways to run a training on given cards, with memory, budget and time of each: what finetune.plan prints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.gpus import GIB, USED_SHARE, Gpu
from finetune.memory import STAGES, Shape, full_memory, host_memory, qlora_memory
from finetune.speed import (
    Budget,
    choose_full_budget,
    choose_qlora_budget,
    filled,
    full_update_seconds,
    qlora_tokens_per_second,
)

CONTEXT_GIB = 0.8  # CUDA context and libraries


@dataclass(frozen=True)
class Workload:
    """The rows to train on and how often: `tokens` is the mean of a row."""

    rows: int
    tokens: float
    epochs: float
    longest_row: int
    rows_per_update: int

    @property
    def updates(self) -> int:
        """Optimiser updates in all."""
        return math.ceil(self.epochs * math.ceil(self.rows / self.rows_per_update))

    @property
    def tokens_in_all(self) -> float:
        """Trained tokens: an epoch's last update may be smaller than the others."""
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


def usable_bytes(gpu: Gpu) -> float:
    """What a plan may use of a card."""
    return (gpu.memory_gib - CONTEXT_GIB) * USED_SHARE * GIB


def qlora_option(shape: Shape, gpu: Gpu, gpus: int, rank: int, work: Workload, fp8: bool = False) -> Option:
    """QLoRA on so many cards, data parallel."""
    budget = choose_qlora_budget(shape, rank, gpu, usable_bytes(gpu), work.longest_row, work.tokens_per_update, gpus)
    shown = budget or Budget(work.longest_row, 0)
    speed = qlora_tokens_per_second(shape, rank, gpu, filled(shown, work.tokens_per_update / gpus), fp8) * gpus
    parts = qlora_memory(shape, rank, shown.tokens, shown.layers_kept, gpus=gpus)
    return Option("qlora", gpus, parts, budget, work.tokens_in_all / speed)


def full_option(shape: Shape, gpu: Gpu, gpus: int, stage: str, work: Workload) -> Option:
    """Full fine-tuning with a DeepSpeed stage; `none` is one card with 16-bit weights and moments."""
    budget = choose_full_budget(shape, stage, gpu, gpus, usable_bytes(gpu), work.longest_row, work.tokens_per_update)
    shown = budget or Budget(work.longest_row, 0)
    parts = full_memory(shape, stage, gpus, shown.tokens, shown.layers_kept)
    updates = work.tokens_in_all / work.tokens_per_update
    seconds = updates * full_update_seconds(shape, gpu, shown, stage, gpus, work.tokens_per_update)
    return Option(stage, gpus, parts, budget, seconds, host_memory(shape, stage))


def full_options(shape: Shape, gpu: Gpu, gpus: int, work: Workload) -> list[Option]:
    """Every stage on so many cards: `none` on one only, 1 to 3 on several, offloading on any number."""
    stages = [stage for stage in STAGES if gpus > 1 and stage != "none" or stage in ("none", "2-offload", "3-offload")]
    return [full_option(shape, gpu, gpus, stage, work) for stage in stages if stage != "none" or gpus == 1]


def choose(options: Sequence[Option]) -> Option | None:
    """The fastest that fits; what is within 2 % of it counts as equal, and the first, simplest of those wins."""
    fitting = [option for option in options if option.budget]
    if not fitting:
        return None
    fastest = min(option.seconds for option in fitting)
    return next(option for option in fitting if option.seconds <= 1.02 * fastest)


def counts(gpus: int) -> list[int]:
    """Numbers of cards worth a line: 1, 2, 4, 8 and the one asked for."""
    return sorted({1, 2, 4, 8, gpus})
