"""float32 numbers rounded to 16 bits at random, right in expectation: small changes survive on the average.

To the nearest, what is below half the distance to the next number is lost, always: a step of training in bfloat16, or
what an adapter adds to a weight. Here a number is rounded up with the probability by which it lies above the lower one.
"""

import torch
from torch import Tensor


def copy_stochastic_(target: Tensor, source: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Copy fp32 `source` into `target`; a 16-bit target is rounded up or down at random. Infinities and NaN stay."""
    if target.dtype == torch.bfloat16:
        return target.copy_(_cut_bits(source, generator))
    if target.dtype == torch.float16:
        return target.copy_(_one_of_two(source, generator))
    return target.copy_(source)


def _cut_bits(source: Tensor, generator: torch.Generator | None) -> Tensor:
    """bfloat16 is the upper half of fp32: 16 random bits are added to the lower half, which is then cut off."""
    bits = source.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(source.isfinite(), rounded, source)


def _one_of_two(source: Tensor, generator: torch.Generator | None) -> Tensor:
    """The nearest float16 number, or by chance its neighbour on the other side of the source."""
    nearest = source.half()
    error = source - nearest.float()
    other = torch.nextafter(nearest, torch.copysign(torch.full_like(error, torch.inf), error).half())
    share = error.abs() / (other.float() - nearest.float()).abs()
    drawn = torch.rand(source.shape, device=source.device, generator=generator)
    return torch.where(drawn < share, other, nearest)
