"""How fast a card trains, estimated from arithmetic and two constants fitted to measured runs; no torch.

A product with a weight costs 2 FLOP a parameter forward, 2 for the gradient of its input, 2 for that of the weight (in
full fine-tuning only), and 2 more where the layer is recomputed. Attention's own products are left out: rows are short.
What a micro-batch costs whatever its size (dequantising, launches) is counted as OVERHEAD_TOKENS more tokens; in QLoRA
it takes no less than the host needs to launch it.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from finetune.arguments import TrainArguments
from finetune.gpus import Gpu
from finetune.memory import (
    ADAM_STATE_BYTES,
    HALF_BYTES,
    STAGES,
    Shape,
    full_memory,
    qlora_memory,
    total,
)

# Fitted to the H100 runs of tests/test_plan.py: share of the card's reachable rate in QLoRA and in full fine-tuning.
QLORA_SHARE, QLORA_OVERHEAD_TOKENS = 0.74, 900
# Python launches a layer's kernels, forward and backward, no faster than this, however little they compute. On H100
# machines a layer of a micro-batch took 9.9 and 10 ms (SmolLM2, 30 layers), 14 and 16 ms (Qwen-1.8B's shape, 24).
LAUNCH_SECONDS = 0.012
FP8_GAIN = 1.15  # of QLoRA's speed by fp8_backward, on an H100
FULL_SHARE, FULL_OVERHEAD_TOKENS = 0.79, 300
HOST_LINK_BYTES = 20e9  # bytes/s between a card and main memory, PCIe 4 x16
# Parameters/s of the CPU's Adam. DeepSpeed's ZeRO-Offload tutorial: a step of 3 B takes 2.4 s on a host of 128 cores.
HOST_ADAM_PARAMETERS = 2e9
# What an update on several cards takes beyond arithmetic, in seconds for each 1e9 parameters, with stage 3 for each of
# its micro-batches: fitted to two H200 and 7.5 B (benchmarks/results/h200-x2).
SEVERAL_CARDS_SECONDS = {"none": 0.006, "1": 0.020, "2": 0.023, "3": 0.038}
UPDATES_DIFFER = 1.12  # an update of 64 short rows holds up to this share of the mean, nine times of ten
MOST_PARTS = 8
BUDGETS = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 256)


def qlora_flops_per_token(shape: Shape, lora_rank: int, recomputed_share: float = 0.0) -> float:
    """FLOP for one trained token: 4 a frozen weight, 6 a LoRA weight, and what is recomputed."""
    recomputed = 2 * recomputed_share * shape.projection_parameters
    return 4 * shape.product_parameters + 6 * shape.lora_parameters(lora_rank) + recomputed


def full_flops_per_token(shape: Shape, recomputed_share: float = 0.0) -> float:
    """FLOP for one trained token of full fine-tuning: 6 a parameter as is custom, and what is recomputed."""
    return 6 * shape.parameters + 2 * recomputed_share * shape.parameters


@dataclass(frozen=True)
class Budget:
    """What one forward pass holds: at most `tokens`, `layers_kept` of the layers not recomputed."""

    tokens: int
    layers_kept: int


def layers_allowed(train: TrainArguments, layers: int) -> tuple[int, int] | None:
    """Least and most of the `layers` that may be kept by the JSON's word, None for any number."""
    if not train.gradient_checkpointing:
        return layers, layers
    return None if train.recompute_layers < 0 else (max(0, layers - train.recompute_layers),) * 2


def qlora_tokens_per_second(shape: Shape, lora_rank: int, gpu: Gpu, budget: Budget, fp8: bool = False) -> float:
    """Trained tokens per second of one card, `budget` being what a micro-batch holds."""
    flops = qlora_flops_per_token(shape, lora_rank, 1 - budget.layers_kept / shape.layers)
    rate = gpu.reachable_flops * QLORA_SHARE * (FP8_GAIN if fp8 else 1)
    computed = rate / flops * budget.tokens / (budget.tokens + QLORA_OVERHEAD_TOKENS)
    return min(computed, budget.tokens / (shape.layers * LAUNCH_SECONDS))


def full_tokens_per_second(shape: Shape, gpu: Gpu, budget: Budget) -> float:
    """Trained tokens per second of one card while it computes, transfers left out."""
    flops = full_flops_per_token(shape, 1 - budget.layers_kept / shape.layers)
    return gpu.reachable_flops * FULL_SHARE / flops * budget.tokens / (budget.tokens + FULL_OVERHEAD_TOKENS)


def full_update_seconds(
    shape: Shape, gpu: Gpu, budget: Budget, stage: str, gpus: int, tokens_per_update: float
) -> float:
    """Seconds of an update.

    DeepSpeed's transfers between cards overlap with computing; those to main memory and ours, behind the last
    micro-batch, do not.
    """
    tokens_per_card = tokens_per_update / gpus
    parts = micro_batches(budget, tokens_per_card)
    computing = tokens_per_card / full_tokens_per_second(shape, gpu, filled(budget, tokens_per_card))
    weights = HALF_BYTES * shape.parameters
    # Once an update gradients are reduced and weights gathered, or gradients added up; stage 2 reduces in every
    # micro-batch, stage 3 also gathers the weights there, forward and backward.
    passes = {"n": 2.0, "1": 2.0, "2": parts + 1.0, "3": 3.0 * parts}[stage[0]] if gpus > 1 else 0.0
    moving = passes * weights * (gpus - 1) / gpus / (gpu.link_gb_per_second * 1e9)
    times = 0 if gpus == 1 else parts if stage == "3" else 1
    more = times * SEVERAL_CARDS_SECONDS.get(stage, 0.0) * shape.parameters / 1e9
    if stage == "none":
        return computing + moving + more
    if stage.endswith("offload"):
        crossings = 2.0 + (2.0 * parts if stage.startswith("3") else 0.0)
        more = crossings * weights / gpus / HOST_LINK_BYTES + shape.parameters / HOST_ADAM_PARAMETERS
    return max(computing, moving) + more


def _best(
    fits: Callable[[Budget], bool],
    speed: Callable[[Budget], float],
    sizes: Iterable[int],
    least_kept: int,
    most_kept: int,
) -> Budget | None:
    """The fastest budget that fits: for each number of tokens as many layers kept as there is room for.

    Of equally fast ones the largest: it cuts fewer of the updates that are larger than the mean.
    """
    candidates = []
    for tokens in sizes:
        choices = (Budget(tokens, kept) for kept in range(most_kept, least_kept - 1, -1))
        candidates.extend(itertools.islice(filter(fits, choices), 1))
    return max(candidates, key=lambda budget: (speed(budget), budget.tokens), default=None)


def _sizes(longest_row: int, tokens_per_card: float) -> list[int]:
    """Budgets worth trying: at least the longest row, not much more than a card's share of an update.

    Among them equal parts of that share, a little larger than the mean: updates differ in size.
    """
    shares = {math.ceil(tokens_per_card * UPDATES_DIFFER / parts) for parts in range(1, MOST_PARTS + 1)}
    largest = min(max(shares), math.ceil(BUDGETS[0] * UPDATES_DIFFER))
    return sorted({longest_row, *(size for size in {*BUDGETS, *shares} if longest_row <= size <= largest)})


def micro_batches(budget: Budget, tokens_per_card: float) -> int:
    """Into how many an update is cut on each card."""
    return max(1, math.ceil(tokens_per_card / budget.tokens))


def filled(budget: Budget, tokens_per_card: float) -> Budget:
    """The budget as it is filled: an update is cut into equal micro-batches."""
    return replace(budget, tokens=max(1, round(tokens_per_card / micro_batches(budget, tokens_per_card))))


def choose_qlora_budget(
    shape: Shape,
    lora_rank: int,
    gpu: Gpu,
    memory_bytes: float,
    longest_row: int,
    tokens_per_update: float,
    gpus: int = 1,
    lora_bytes: int = 4,
    optimizer_bytes: int = ADAM_STATE_BYTES,
    layers_kept: tuple[int, int] | None = None,
    tokens: int | None = None,
) -> Budget | None:
    """Fastest budget inside `memory_bytes` per card; None when even one row with all layers recomputed does not fit.

    `layers_kept`: least and most layers not recomputed, default any. `tokens`: the budget, where it is fixed.
    """

    def fits(budget: Budget) -> bool:
        held = max(budget.tokens, longest_row)  # a row longer than a fixed budget is a micro-batch of its own
        parts = qlora_memory(shape, lora_rank, held, budget.layers_kept, lora_bytes, optimizer_bytes, gpus)
        return total(parts) <= memory_bytes

    least, most = layers_kept or (0, shape.layers)
    return _best(
        fits,
        lambda budget: qlora_tokens_per_second(shape, lora_rank, gpu, filled(budget, tokens_per_update / gpus)),
        [tokens] if tokens else _sizes(longest_row, tokens_per_update / gpus),
        least,
        most,
    )


def choose_full_budget(
    shape: Shape,
    stage: str,
    gpu: Gpu,
    gpus: int,
    memory_bytes: float,
    longest_row: int,
    tokens_per_update: float,
    layers_kept: tuple[int, int] | None = None,
    tokens: int | None = None,
) -> Budget | None:
    """Fastest budget of full fine-tuning with a stage inside `memory_bytes` per card, or None.

    `layers_kept` and `tokens` as in choose_qlora_budget.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage}")

    def fits(budget: Budget) -> bool:
        held = max(budget.tokens, longest_row)
        return total(full_memory(shape, stage, gpus, held, budget.layers_kept)) <= memory_bytes

    least, most = layers_kept or (0, shape.layers)
    return _best(
        fits,
        lambda budget: -full_update_seconds(shape, gpu, budget, stage, gpus, tokens_per_update),
        [tokens] if tokens else _sizes(longest_row, tokens_per_update / gpus),
        least,
        most,
    )
