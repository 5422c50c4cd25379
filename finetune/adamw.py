"""Which words of the JSON's `optim` mean AdamW with 32-bit state, and torch's fused form of it."""

from typing import Any

from finetune.arguments import Arguments

ADAMW = ("adamw_torch", "adamw_torch_fused")
PAGED_ADAMW = "paged_adamw_32bit"
ADAM_NUMBERS = {"betas": (0.9, 0.999), "eps": 1e-8}  # transformers' own


def fused_adamw(arguments: Arguments) -> tuple[type, dict[str, Any]]:
    """transformers' optimizer_cls_and_kwargs: all parameters in a few kernels.

    bitsandbytes' paged form does the same arithmetic in one call per matrix, 560 of them for a 14B, and waits for the
    card at the end (benchmarks/results/h100-80g/README.md has both times). What it pages is 2 GiB at rank 64.
    """
    import torch

    return torch.optim.AdamW, {"lr": arguments.train.learning_rate, **ADAM_NUMBERS, "fused": True}
