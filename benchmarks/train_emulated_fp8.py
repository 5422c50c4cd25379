"""qwen_qlora.train_qlora with FP8's rounding on a device that has no FP8 products, such as a CPU.

    python -m benchmarks.train_emulated_fp8 backward --train_args_file JSON ...     # flags of qwen_qlora.train_qlora
    python -m benchmarks.train_emulated_fp8 both --train_args_file JSON ...

Weights, gradients and for `both` also the forward product's factors go to float8_e4m3 and back as finetune.frozen does
it on a card; the product of the rounded numbers is a 16- or 32-bit one. For comparing losses, not for speed.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.errors import UserError, run_main
from finetune.frozen import FP8_LARGEST, Frozen
from finetune.nf4 import dense_weight


class EmulatedFrozen(Frozen):
    """A frozen layer whose backward product is that of numbers rounded to FP8."""

    def __init__(self, base: nn.Module, fp8_backward: bool = False) -> None:
        super().__init__(base)
        self.emulated_scale = dense_weight(base, torch.float32).abs().max().item() / FP8_LARGEST

    def add_input_gradient(self, total_TI: Tensor, grad_TO: Tensor) -> Tensor:
        """As Frozen.add_input_gradient."""
        return total_TI.addmm_(rounded_rows(grad_TO), self._rounded_weight(grad_TO.dtype))

    def _rounded_weight(self, dtype: torch.dtype) -> Tensor:
        return rounded(dense_weight(self.base, torch.float32), self.emulated_scale).to(dtype)


class EmulatedBothWays(EmulatedFrozen):
    """The forward product's factors are rounded too."""

    def forward(self, wide_TK: Tensor, b_OR: Tensor) -> Tensor:
        """As Frozen.forward."""
        inputs = self.base.in_features
        return super().forward(torch.cat([rounded_rows(wide_TK[:, :inputs]), wide_TK[:, inputs:]], 1), b_OR)

    def _fill_dense(self, out_OI: Tensor) -> Tensor:
        return out_OI.copy_(self._rounded_weight(out_OI.dtype))


KINDS = {"backward": EmulatedFrozen, "both": EmulatedBothWays}


def rounded(values: Tensor, scale: float | Tensor) -> Tensor:
    """float32 values to float8_e4m3 and back, `scale` being what 1 stands for."""
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def rounded_rows(x_TI: Tensor) -> Tensor:
    """Each row with a scale of its own, as finetune.kernels.rows_to_fp8 rounds it."""
    wide = x_TI.float()
    return rounded(wide, wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_LARGEST).to(x_TI.dtype)


def main(words: Sequence[str]) -> int:
    """Train; the exit status of qwen_qlora.train_qlora. Raises UserError where it is not said what to round."""
    from finetune import projection
    from finetune.arguments import parse_arguments
    from finetune.methods import QLORA
    from finetune.training import run_training

    if not words or words[0] not in KINDS:
        raise UserError(f"the first word says what is rounded, {' or '.join(KINDS)}; found {' '.join(words[:1])!r}.")
    projection.Frozen = KINDS[words[0]]
    return run_training(parse_arguments(words[1:]), QLORA)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
