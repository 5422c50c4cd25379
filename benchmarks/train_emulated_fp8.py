"""qwen_qlora.train_qlora with fp8_base's rounding on a device that has no FP8 products, such as a CPU.

    python -m benchmarks.train_emulated_fp8 --train_args_file JSON ...      # the flags of qwen_qlora.train_qlora

Weights, activations and gradients go to float8_e4m3 and back as finetune.frozen does it on a card; the product of the
rounded numbers is a 16- or 32-bit one. For comparing losses with and without, not for speed.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import run_main
from finetune.frozen import FP8_LARGEST, Frozen
from finetune.nf4 import dense_weight


class EmulatedFrozen(Frozen):
    """A frozen layer whose products are those of numbers rounded to FP8."""

    def __init__(self, base: nn.Module, fp8: bool = False) -> None:
        super().__init__(base)
        self.emulated_scale = dense_weight(base, torch.float32).abs().max().item() / FP8_LARGEST

    def forward(self, x_TI: Tensor, low_TR: Tensor, b_OR: Tensor, shared: dict[str, Any]) -> Tensor:
        """As Frozen.forward."""
        return super().forward(rounded_rows(x_TI), low_TR, b_OR, shared)

    def add_input_gradient(self, total_TI: Tensor, grad_TO: Tensor) -> Tensor:
        """As Frozen.add_input_gradient."""
        return super().add_input_gradient(total_TI, rounded_rows(grad_TO))

    def _dense(self, dtype: torch.dtype) -> Tensor:
        return rounded(dense_weight(self.base, torch.float32), self.emulated_scale).to(dtype)


def rounded(values: Tensor, scale: float | Tensor) -> Tensor:
    """float32 values to float8_e4m3 and back, `scale` being what 1 stands for."""
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def rounded_rows(x_TI: Tensor) -> Tensor:
    """Each row with a scale of its own, as finetune.kernels.rows_to_fp8 rounds it."""
    wide = x_TI.float()
    return rounded(wide, wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_LARGEST).to(x_TI.dtype)


def main(flags: Sequence[str] | None = None) -> int:
    """Train; the exit status of qwen_qlora.train_qlora."""
    from finetune import projection
    from finetune.arguments import parse_arguments
    from finetune.methods import QLORA
    from finetune.training import run_training

    arguments = parse_arguments(flags, description=__doc__)
    projection.Frozen = EmulatedFrozen
    return run_training(arguments, QLORA)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
