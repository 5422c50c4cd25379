"""Dropout as a function of a seed: the backward pass draws the forward pass's mask again instead of keeping it."""

import torch
from torch import Tensor

from finetune.optional import kernels

LEVELS = 1 << 16  # a rate is rounded to a multiple of 1/LEVELS: 16 random bits decide about an element


def draw_seed() -> int:
    """A 31-bit seed from torch's CPU generator, which recomputation of a layer winds back and a checkpoint saves."""
    return int(torch.randint(2**31 - 1, ()))


def dropout(x: Tensor, rate: float, seed: int) -> Tensor:
    """x with a share `rate` (0 <= rate < 1) of its elements zero, the others divided by what is left.

    The same seed and shape give the same mask on the same kind of device. A rate of 0 gives x itself.
    """
    dropped = round(rate * LEVELS)
    if not dropped:
        return x
    factor = LEVELS / (LEVELS - dropped)
    if x.is_cuda and x.is_contiguous() and (triton := kernels()):
        return triton.seeded_dropout(x, dropped, factor, seed)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    bits = torch.randint(LEVELS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return x * (bits >= dropped) * factor
