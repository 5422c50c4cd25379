"""Products with a frozen weight: in 16 bits after dequantisation, the backward one in FP8 if wanted (Hopper, Ada).

FP8: NF4 weights of one input go to float8_e4m3 in one pass, without a 16-bit copy, with one scale for all; rows of
gradients (tokens) have a scale each. On an H100 such a product runs at 1,250 to 1,350 TFLOP/s instead of 720 to 745
(T = 8,192); its result is off by 3.7 % in norm, 2.6 % of it from rounding the weight, unbiased over elements.

The forward product stays in 16 bits. Rounded too, it is as fast again, but the adapter then learns to make up for a
base that it is not used with: the training loss of a real model rises by 0.03 to 0.13, where rounding the backward
product alone changes nothing measurable (benchmarks/results/fp8.md).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import UserError
from finetune.nf4 import dense_weight, is_4bit
from finetune.optional import kernels

FP8_LARGEST = 448.0  # of float8_e4m3
FEW_ROWS = 8  # bitsandbytes 0.50, _gemm_4bit_use_custom_cuda for float32


def check_fp8(device: torch.device) -> None:
    """Raises UserError where the device has no FP8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(f"fp8_backward needs a card of the Ada or Hopper generation (4090, L40S, H100), found {found}.")


class Frozen:
    """A frozen linear layer's products.

    `fp8_backward` is obeyed on CUDA for double-quantised NF4 of sizes divisible by 64; `scale` is None elsewhere.
    """

    def __init__(self, base: nn.Module, fp8_backward: bool = False) -> None:
        self.base = base
        self.has_kernel = self._has_kernels_form()
        self.scale = self._fp8_scale() if fp8_backward and self.has_kernel else None

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

    def forward(self, wide_TK: Tensor, b_OR: Tensor) -> Tensor:
        """x W^T + low B^T + bias, (T, O): one product over x and low, which lie side by side in wide_TK (`widened`).

        Added to a product that is already rounded, an adapter's first terms are lost: they are smaller than half of its
        last place (benchmarks.small_terms). On an H100 that is so for addmm too, whose kernel rounds before it adds.
        """
        bias = None if self.base.bias is None else self.base.bias.to(wide_TK.dtype)
        weight_OK = self.widened_weight(b_OR, wide_TK.shape[1] - self.base.in_features, wide_TK.dtype)
        return functional.linear(wide_TK, weight_OK, bias)

    def few_rows(self, x_TI: Tensor) -> Tensor:
        """x W^T + bias in float32, unrounded, for x in float32 and a 4-bit weight.

        Below FEW_ROWS rows bitsandbytes multiplies by the 4 bits themselves: an eighth of a dense weight's traffic.
        """
        from bitsandbytes import matmul_4bit

        output_TO = matmul_4bit(x_TI, self.base.weight, quant_state=self.base.weight.quant_state)
        return output_TO if self.base.bias is None else output_TO + self.base.bias

    def widened_weight(self, b_OR: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """(O, K): W, and in K - I = `columns` columns B and zeros."""
        inputs, rank = self.base.in_features, b_OR.shape[1]
        weight_OK = b_OR.new_empty(self.base.out_features, inputs + columns, dtype=dtype)
        self._fill_dense(weight_OK[:, :inputs])
        weight_OK[:, inputs : inputs + rank] = b_OR
        if rank < columns:
            weight_OK[:, inputs + rank :] = 0
        return weight_OK

    def add_input_gradient(self, total_TI: Tensor, grad_TO: Tensor) -> Tensor:
        """total + grad W in 16 bits, in place."""
        return total_TI.addmm_(grad_TO, self._dense(grad_TO.dtype))

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in 16 or 32 bits."""
        if not self.has_kernel:
            return dense_weight(self.base, dtype)
        weight = self.base.weight
        return kernels().nf4_to_dense(weight, weight.new_empty(weight.quant_state.shape, dtype=dtype))

    def _fill_dense(self, out_OI: Tensor) -> Tensor:
        """The weight in `out_OI`, whose rows may lie apart."""
        if self.has_kernel:
            return kernels().nf4_to_dense(self.base.weight, out_OI)
        return out_OI.copy_(dense_weight(self.base, out_OI.dtype))


def columns_behind(rank: int) -> int:
    """So many that a row begins at a multiple of 16 numbers: products and kernels are slower where it does not."""
    return math.ceil(rank / 16) * 16


def widened(x_TI: Tensor, low_TR: Tensor, largest_rank: int) -> Tensor:
    """(T, K): x, low and zeros in the columns that `largest_rank` needs."""
    padding = columns_behind(largest_rank) - low_TR.shape[1]
    more = [x_TI.new_zeros(len(x_TI), padding)] if padding else []
    # cat copies as fast as the memory is; an assignment to columns of a new tensor takes 1.7 times as long.
    return torch.cat([x_TI, low_TR, *more], 1)


def fp8_input_gradient(layers: Sequence[Frozen], grads_TO: Sequence[Tensor]) -> Tensor:
    """The sum of all grad_i W_i, (T, I) in bfloat16, as one product over the K outputs of one to three layers."""
    rounded_TK, scales_T1 = kernels().rows_to_fp8(grads_TO)
    scale = max(layer.scale for layer in layers)
    sizes = [grad.shape[1] for grad in grads_TO]
    weight_IK = rounded_TK.new_empty(layers[0].base.weight.quant_state.shape[1], sum(sizes))
    for layer, weight_IO in zip(layers, weight_IK.split(sizes, 1), strict=True):
        kernels().nf4_to_dense(layer.base.weight, weight_IO, scale, transposed=True)
    scales_1I = scales_T1.new_full((1, len(weight_IK)), scale)
    return torch._scaled_mm(
        rounded_TK, weight_IK.T, scales_T1, scales_1I, out_dtype=torch.bfloat16, use_fast_accum=True
    )
