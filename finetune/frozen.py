"""Products with a frozen weight: 16-bit after dequantisation, or in 8-bit floating point on Hopper and Ada.

FP8: an NF4 weight goes to float8_e4m3 in one pass, without a 16-bit copy, with one scale for the whole matrix; rows of
the other factor (tokens) have a scale each. On an H100 such a product runs at 1,250 to 1,350 TFLOP/s instead of 720 to
745 (T = 8,192); its result is off by 3.7 % in norm, 2.6 % of it from rounding the weight, unbiased over elements.
"""

from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.nf4 import dense_weight, is_4bit
from finetune.optional import kernels

FP8_LARGEST = 448.0  # of float8_e4m3


def check_fp8(device: torch.device) -> None:
    """Raises UserError where the device has no FP8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(f"fp8_base needs a card of the Ada or Hopper generation (4090, L40S, H100), found {found}.")


class Frozen:
    """A frozen linear layer's products. `fp8` is obeyed on CUDA for double-quantised NF4 of sizes divisible by 64."""

    def __init__(self, base: nn.Module, fp8: bool = False) -> None:
        self.base = base
        self.has_kernel = self._has_kernels_form()
        self.scale = self._fp8_scale() if fp8 and self.has_kernel else None

    def _has_kernels_form(self) -> bool:
        """Whether finetune.kernels can read the weight: one pass instead of bitsandbytes' two and their Python."""
        state = self.base.weight.quant_state if is_4bit(self.base) and self.base.weight.is_cuda else None
        is_nf4 = state is not None and state.quant_type == "nf4" and state.nested and state.blocksize == 64
        is_even = is_nf4 and state.state2.blocksize == 256 and not any(size % 64 for size in state.shape)
        return is_even and kernels() is not None

    def _fp8_scale(self) -> float:
        """What the largest weight is divided by to become FP8_LARGEST."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self.base.weight.quant_state
        largest = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return largest.abs().max().item() / FP8_LARGEST

    def forward(self, x_TI: Tensor, low_TR: Tensor, b_OR: Tensor, shared: dict[str, Any]) -> Tensor:
        """x W^T + bias + low B^T, (T, O). `shared` carries what the products of one x have in common."""
        bias = None if self.base.bias is None else self.base.bias.to(x_TI.dtype)
        if self.scale is not None:
            if "x" not in shared:
                shared["x"] = kernels().rows_to_fp8(x_TI)
            return self._fp8_product(*shared["x"], transposed=False).addmm_(low_TR, b_OR.T)
        # The small product first: the large one then adds to it in 32 bits.
        output_TO = low_TR @ b_OR.T if bias is None else torch.addmm(bias, low_TR, b_OR.T)
        return output_TO.addmm_(x_TI, self._dense(x_TI.dtype).T)

    def add_input_gradient(self, total_TI: Tensor, grad_TO: Tensor) -> Tensor:
        """total + grad W, in place."""
        if self.scale is not None:
            return total_TI.add_(self._fp8_product(*kernels().rows_to_fp8(grad_TO), transposed=True))
        return total_TI.addmm_(grad_TO, self._dense(grad_TO.dtype))

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in 16 or 32 bits."""
        if not self.has_kernel:
            return dense_weight(self.base, dtype)
        return kernels().nf4_to_dense(self.base.weight, dtype)

    def _fp8_product(self, left: Tensor, scales_T1: Tensor, transposed: bool) -> Tensor:
        """left W^T + bias, or for `transposed` left W, in bfloat16."""
        weight = kernels().nf4_to_dense(self.base.weight, torch.float8_e4m3fn, self.scale, transposed)
        scales_1N = scales_T1.new_full((1, len(weight)), self.scale)
        bias = None if transposed or self.base.bias is None else self.base.bias.to(torch.bfloat16)
        return torch._scaled_mm(
            left, weight.T, scales_T1, scales_1N, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
