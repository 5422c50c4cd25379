"""The gradients of the trained parameters at the end of an update: added up over ranks, clipped, dropped, forgotten.

The parameters are listed once. A 14B with adapters has 3,500 modules; walking through them takes a CPU about 8 ms, and
at the end of an update the card waits meanwhile.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.memory import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGE = 4_000_000  # numbers from which a gradient is sent by itself, where it lies


class Gradients:
    """`norm` is that of the last `clip`, before clipping, on the device.

    Whether it is a number is not asked here: the answer would have to be waited for. `clip` makes NaN of infinite
    gradients, the trainer reads the norm where it reads the loss, before the optimiser steps, and calls `drop`.
    """

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.world_size = world_size
        self.norm: Tensor | None = None

    def share_parameters(self) -> None:
        """Every rank goes on with the first one's trained parameters."""
        if self.world_size > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, 0)

    def ranks_differ(self) -> bool:
        """Whether ranks hold different parameters, which the same steps from the same start never give."""
        if self.world_size == 1:
            return False
        sums = torch.stack([parameter.detach().sum(dtype=torch.float64) for parameter in self.parameters])
        first = sums.clone()
        dist.broadcast(first, 0)
        unequal = (sums != first).any().float()
        dist.all_reduce(unequal, op=dist.ReduceOp.MAX)
        return bool(unequal)

    def add_up(self) -> None:
        """Each becomes its sum over ranks: large matrices where they lie, small ones in flat blocks."""
        if self.world_size == 1:
            return
        present = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        large = [gradient for gradient in present if _is_large(gradient)]
        sums = [dist.all_reduce(gradient, async_op=True) for gradient in large]
        for block in _blocks([gradient for gradient in present if not _is_large(gradient)]):
            flat = torch.cat([gradient.reshape(-1) for gradient in block])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in block])
            torch._foreach_copy_(block, [part.view_as(one) for part, one in zip(parts, block, strict=True)])
        for one in sums:
            one.wait()

    def clip(self, accelerator: "Accelerator", max_norm: float) -> None:
        """Scale all so that their norm is at most max_norm (0: no limit). Does not wait for the device."""
        self.norm = accelerator.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def drop(self) -> None:
        """None, so that the optimiser leaves weights and moments as they are, and a norm of 0."""
        self.forget()
        self.norm = torch.zeros_like(self.norm)

    def forget(self, set_to_none: bool = True) -> None:
        """As nn.Module.zero_grad, in whose place it stands."""
        for parameter in self.parameters:
            parameter.grad = None


def _is_large(gradient: Tensor) -> bool:
    """Whether it is worth a transfer of its own, which spares a copy of it."""
    return gradient.numel() >= LARGE and gradient.is_contiguous()


def _blocks(tensors: Sequence[Tensor], max_elements: int = BLOCK_ELEMENTS) -> Iterator[list[Tensor]]:
    """Tensors of one dtype in groups of about max_elements, in order."""
    block: list[Tensor] = []
    for tensor in tensors:
        is_other = block and block[0].dtype != tensor.dtype
        if block and (is_other or sum(map(Tensor.numel, block)) + tensor.numel() > max_elements):
            yield block
            block = []
        block.append(tensor)
    if block:
        yield block
