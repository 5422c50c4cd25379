"""Models whose projections are in bitsandbytes' 4-bit NF4: how they are quantised, and their weights read back."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def nf4_config(compute_dtype: torch.dtype) -> "BitsAndBytesConfig":
    """transformers' quantization_config: NF4, double-quantised, as the QLoRA paper has it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_4bit(layer: nn.Module) -> bool:
    """Whether the layer's weight is quantised to 4 bits by bitsandbytes."""
    return hasattr(layer, "compute_dtype") and getattr(layer.weight, "quant_state", None) is not None


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """(O, I) weight of a linear layer in `dtype`; a 4-bit one is dequantised."""
    if not is_4bit(layer):
        return layer.weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


def keep_layout(model: Any) -> None:
    """Stop bitsandbytes from repacking weights on CPUs with AVX512-BF16 in the first pass without gradients.

    Repacked weights have no backward pass, need sizes divisible by 64, and answer differently from other machines.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
