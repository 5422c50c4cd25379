"""A frozen (4-bit) projection with its LoRA as one autograd function: dequantise, product, low-rank update in place.

    y = x W^T + b + s * dropout(x) A^T B^T

peft's own path copies the output and adds a tensor for every term; this one writes each term into the output. Saved for
the backward pass are x and dropout(x) A^T alone: W is dequantised again, the dropout mask drawn again from the saved
generator state, so a seed gives the same masks as peft's path. Parameters, their names and the adapter on disk stay
peft's. Dimensions: T = tokens, I = input size, O = output size, R = rank.
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def fuse_projections(model: "PeftModel") -> int:
    """Give every LoRA projection over a frozen linear layer the fused path; returns how many have it.

    Passes without gradients (generation, evaluation), several adapters, merged or disabled ones run peft's code as
    before. Layers of another kind keep it altogether, which one notice in the log says.
    """
    from peft.tuners.lora import LoraLayer

    fused, left = 0, []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or hasattr(module, "_peft_forward"):
            continue
        reason = _why_not(module)
        if reason:
            left.append(f"{name} ({reason})")
            continue
        base = module.get_base_layer()
        if hasattr(base, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weight in the first evaluation and lose every gradient after it.
            base.support_avx512bf16_for_cpu = False
        module._peft_forward, module.forward = module.forward, MethodType(_forward, module)
        fused += 1
    if left:
        logger.warning("%d LoRA layers keep peft's slower path, the first is %s", len(left), left[0])
    return fused


def _why_not(module: nn.Module) -> str | None:
    base = module.get_base_layer()
    if type(base) is not nn.Linear and not _is_4bit(base):
        return f"base layer {type(base).__name__}"
    if module.lora_variant or any(module.lora_bias.values()):
        return "a LoRA variant or a LoRA bias"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "trainable base weights"
    if hasattr(base.weight, "ds_id"):
        return "weights partitioned by ZeRO-3"
    return None


def _is_4bit(base: nn.Module) -> bool:
    return hasattr(base, "compute_dtype") and getattr(base.weight, "quant_state", None) is not None


def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = [name for name in self.active_adapters if name in self.lora_A]
    plain = (
        self.disable_adapters
        or self.merged
        or len(adapters) != 1
        or args
        or any(v is not None for v in kwargs.values())
    )
    if plain or not torch.is_grad_enabled() or not x.numel():
        return self._peft_forward(x, *args, **kwargs)
    (name,) = adapters
    base, dropout = self.get_base_layer(), self.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = (base.compute_dtype if _is_4bit(base) else base.weight.dtype) or x.dtype
    output = _Projection.apply(
        x.to(dtype), self.lora_A[name].weight, self.lora_B[name].weight, base, self.scaling[name], rate
    )
    return output.to(x.dtype)


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """(O, I) weight of a linear layer in `dtype`; a 4-bit one is dequantised."""
    if not _is_4bit(base):
        return base.weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, base: nn.Module, scaling: float, rate: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        ctx.base, ctx.scaling, ctx.rate, ctx.shape = base, scaling, rate, x.shape
        ctx.generator_state = _generator_state(x.device) if rate else None
        a_RI, b_OR = lora_a.to(x.dtype), lora_b.to(x.dtype)
        low_TR = functional.dropout(x_TI, rate) @ a_RI.T if rate else x_TI @ a_RI.T
        weight_OI = dense_weight(base, x.dtype)
        if base.bias is None:
            output_TO = x_TI @ weight_OI.T
        else:
            output_TO = torch.addmm(base.bias.to(x.dtype), x_TI, weight_OI.T)
        output_TO.addmm_(low_TR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_TI, low_TR, lora_a, lora_b)
        return output_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, lora_a, lora_b = ctx.saved_tensors
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        grad_TO = grad_output.reshape(-1, grad_output.shape[-1])
        grad_low_TR = (grad_TO @ lora_b.to(grad_TO.dtype)).mul_(ctx.scaling)
        redraw = _redraw(ctx)
        grad_x = grad_a = grad_b = None
        if wants_b:
            grad_b = (grad_TO.T @ low_TR).mul_(ctx.scaling).to(lora_b.dtype)
        if wants_a:
            grad_a = (grad_low_TR.T @ redraw(x_TI)).to(lora_a.dtype)
        if wants_x:
            a_RI = lora_a.to(grad_TO.dtype)
            grad_x = grad_TO @ dense_weight(ctx.base, grad_TO.dtype)
            if ctx.rate:
                grad_x += redraw(grad_low_TR @ a_RI)
            else:
                grad_x.addmm_(grad_low_TR, a_RI)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _redraw(ctx: Any) -> Callable[[Tensor], Tensor]:
    """The forward pass's dropout as a function: the same mask each time, the generator left as it was."""

    def dropout(tensor_TI: Tensor) -> Tensor:
        if not ctx.rate:
            return tensor_TI
        now = _generator_state(tensor_TI.device)
        _set_generator_state(tensor_TI.device, ctx.generator_state)
        try:
            return functional.dropout(tensor_TI, ctx.rate)
        finally:
            _set_generator_state(tensor_TI.device, now)

    return dropout
