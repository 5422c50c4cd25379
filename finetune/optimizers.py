"""AdamW for weights and moments in bfloat16 that loses no small update: it rounds stochastically.

A bfloat16 number has 8 significant bits. At a learning rate of 1e-5 most updates are below half the distance to the
next number, so rounding to the nearest drops them, always. Here a number is rounded up with the probability by which it
lies above the lower neighbour: the expectation is exact, and what is lost in one step is made up for in others. The
second moment needs the same: 1 - beta2 = 0.001 of it is below its half distance too.

The random numbers are a function of seed, step and position alone, so a resumed run draws the same ones and nothing
about them has to be saved. On CUDA one Triton kernel reads and writes each number once (14 bytes a parameter);
elsewhere torch does the same arithmetic in 32 bits.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from finetune.rounding import copy_stochastic_

MAX_ELEMENTS = 1 << 18  # of 32-bit copies at a time, where there is no kernel: they fit in a core's cache
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive steps over the seeds


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (decoupled decay) on parameters of any dtype; bfloat16 parameters and moments are rounded stochastically.

    Moments have their parameter's dtype. Gradients may not be sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)
        return result

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        step = int(state["step"])
        seed = _mixed(group["seed"], step, number)
        beta1, beta2 = group["betas"]
        numbers = (
            group["lr"] / (1 - beta1**step),
            1 - group["lr"] * group["weight_decay"],
            beta1,
            beta2,
            (1 - beta2**step) ** -0.5,
            group["eps"],
        )
        tensors = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        is_bfloat16 = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        if parameter.is_cuda and is_bfloat16 and all(map(Tensor.is_contiguous, tensors)) and adamw_kernel():
            launch_kernel(*tensors, numbers, seed)
        else:
            _update_in_pieces(*tensors, numbers, seed)


def _mixed(seed: int, step: int, number: int) -> int:
    """A 31-bit seed for one parameter at one step."""
    mixed = (seed * 1_000_003 + step) * GOLDEN + number * 0xD1B54A32D192ED03
    mixed = (mixed ^ (mixed >> 32)) & (2**64 - 1)
    return (mixed * GOLDEN >> 29) & 0x7FFFFFFF


def _update_in_pieces(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, numbers: tuple[float, ...], seed: int
) -> None:
    """The definition: 32-bit arithmetic on pieces of the flat tensors, results rounded into them."""
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    flat = (tensor.view(-1).split(MAX_ELEMENTS) for tensor in (weight, grad.contiguous(), mean, square))
    rate, keep, beta1, beta2, correction, eps = numbers
    for weight, grad, mean, square in zip(*flat, strict=True):
        wide_grad = grad.float()
        wide_mean = mean.float().mul_(beta1).add_(wide_grad, alpha=1 - beta1)
        wide_square = square.float().mul_(beta2).addcmul_(wide_grad, wide_grad, value=1 - beta2)
        denominator = wide_square.sqrt().mul_(correction).add_(eps)
        wide_weight = weight.float().mul_(keep).addcdiv_(wide_mean, denominator, value=-rate)
        for target, wide in ((mean, wide_mean), (square, wide_square), (weight, wide_weight)):
            copy_stochastic_(target, wide, generator)


@lru_cache(maxsize=1)
def adamw_kernel() -> Any:
    """The Triton kernel, or None where triton is not installed."""
    try:
        from finetune.adamw_kernel import adamw
    except ImportError:
        return None
    return adamw


def launch_kernel(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, numbers: tuple[float, ...], seed: int
) -> None:
    """One pass over contiguous bfloat16 tensors on CUDA."""
    block, count = 1024, weight.numel()
    with torch.cuda.device(weight.device):
        adamw_kernel()[(-(-count // block),)](weight, grad, mean, square, *numbers, seed, count, BLOCK=block)
