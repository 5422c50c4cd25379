"""Frozen (4-bit) projections with their LoRA as one autograd function for all that read the same input.

    y_i = x W_i^T + b_i + s_i * dropout(x) A_i^T B_i^T

peft's own path copies the output and adds a tensor for every term. Here an output is one product, of x and x A^T side
by side with W and B side by side, and each term of the input's gradient is added by the product that computes it. q, k
and v, and gate and up, share their input: it is multiplied with all their A at once, its gradient is summed inside the
products, and one dropout mask serves them together, as in the original LoRA code's merged projections (microsoft/LoRA,
MergedLinear). Saved for the backward pass are x (or what it is made of: finetune.recipes) and dropout(x) A^T: W is
dequantised again, the mask drawn again from its seed. Parameters and the adapter on disk stay peft's.

Dimensions: T = tokens, I = input size, O = output size of one projection, R = its rank, S = all ranks of a group.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.dropout import draw_seed, dropout
from finetune.frozen import FEW_ROWS, Frozen, columns_behind, fp8_input_gradient, widened
from finetune.nf4 import is_4bit, keep_layout
from finetune.recipes import split_recipe

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_projections(model: "PeftModel", fp8_backward: bool = False) -> int:
    """Give every LoRA projection over a frozen linear layer the fused path; returns how many have it.

    Several adapters, merged or disabled ones run peft's code as before. Layers of another kind keep it altogether,
    which one notice in the log says. `fp8_backward`: the backward products with 4-bit weights run in 8-bit floating
    point (finetune.frozen).
    """
    from peft.tuners.lora import LoraLayer

    keep_layout(model)
    fused, left, in_16_bits = 0, [], 0
    for name, module in model.named_modules():
        layers = {key: child for key, child in module.named_children() if isinstance(child, LoraLayer)}
        covered = {}
        for key, layer in layers.items():
            if hasattr(layer, "_peft_forward"):
                continue
            if reason := _why_not(layer):
                left.append(f"{name}.{key} ({reason})")
            else:
                covered[key] = layer
        for group in _groups(covered):
            in_16_bits += SharedInput([covered[key] for key in group], fp8_backward).num_in_16_bits
        fused += len(covered)
    if left:
        logger.warning("%d LoRA layers keep peft's slower path, the first is %s", len(left), left[0])
    if fp8_backward and in_16_bits:
        logger.warning(
            "%d projections keep 16-bit products: FP8 needs NF4 weights of sizes divisible by 64", in_16_bits
        )
    return fused


def _groups(layers: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Names of the layers by common input: those of SHARED_INPUTS together where all are there, others alone.

    Alone, too, where their adapters are scaled differently (peft's alpha_pattern).
    """
    together = [group for group in SHARED_INPUTS if all(key in layers for key in group)]
    together = [group for group in together if len({_scaling(layers[key]) for key in group}) == 1]
    grouped = {key for group in together for key in group}
    return together + [(key,) for key in layers if key not in grouped]


def _why_not(module: nn.Module) -> str | None:
    base = module.get_base_layer()
    if type(base) is not nn.Linear and not is_4bit(base):
        return f"base layer {type(base).__name__}"
    if module.lora_variant or any(module.lora_bias.values()):
        return "a LoRA variant or a LoRA bias"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "trainable base weights"
    if hasattr(base.weight, "ds_id"):
        return "weights partitioned by ZeRO-3"
    return None


class SharedInput:
    """Projections of one input: the first that is called with it computes all, the others take their outputs.

    A member that is called with another input computes alone. Outputs are held until they are taken, at most until the
    next input comes.
    """

    def __init__(self, members: Sequence[nn.Module], fp8_backward: bool) -> None:
        self._frozen = {module: Frozen(module.get_base_layer(), fp8_backward) for module in members}
        self._input: Tensor | None = None
        self._waiting: dict[nn.Module, Tensor] = {}
        for module in members:
            module._peft_forward, module.forward = module.forward, partial(self, module)

    @property
    def num_in_16_bits(self) -> int:
        """Members without FP8 products: all where one cannot have them."""
        return 0 if all(frozen.scale is not None for frozen in self._frozen.values()) else len(self._frozen)

    def __call__(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a member, shaped and typed as peft's."""
        if _is_special(module, x, args, kwargs):
            return module._peft_forward(x, *args, **kwargs)
        if x is not self._input or module not in self._waiting:
            alone = x is self._input
            members = [module] if alone else [member for member in self._frozen if _scaling(member) == _scaling(module)]
            # None where the pass ends in here: recomputation and a lack of memory both raise, and must hold nothing.
            self._input = None
            self._waiting.update(zip(members, self._outputs(members, x), strict=True))
            self._input = x
        output = self._waiting.pop(module)
        if not self._waiting:
            self._input = None
        return output

    def _outputs(self, members: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        self._waiting.clear()
        return _outputs(members, [self._frozen[member] for member in members], x)


def fuse_for_inference(model: "PeftModel") -> None:
    """Give every LoRA projection over a linear layer the output that it had in training.

    In 16 bits peft adds the adapter's term to an output that is already rounded, where a small one is lost: with B
    moved by 0.001 half of what was learned (benchmarks/results/small_terms.md). Keeps no state between calls.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not _why_not(module) and _active_adapter(module):
            in_4_bits = is_4bit(module.get_base_layer())
            way = _Dequantised(module) if in_4_bits else _Widened(module)
            module._peft_forward, module.forward = module.forward, partial(_alone, module, way)


def _alone(module: nn.Module, way: Callable[[Tensor], Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return module._peft_forward(x, *args, **kwargs) if _is_special(module, x, args, kwargs) else way(x)


class _Widened:
    """A 16-bit weight, widened once; the base's own becomes a part of it. Two products and a copy of x a call."""

    def __init__(self, module: nn.Module) -> None:
        name, self._base = _active_adapter(module), module.get_base_layer()
        weight_OI, b_OR = self._base.weight.data, module.lora_B[name].weight.detach()
        a_RI = module.scaling[name] * module.lora_A[name].weight.detach()
        columns = columns_behind(len(a_RI))
        self._weight_OK = Frozen(self._base).widened_weight(b_OR, columns, weight_OI.dtype)
        self._base.weight.data = self._weight_OK[:, : self._base.in_features]
        # A row for each column behind W: what B has no column for is multiplied with zeros.
        self._a_SI = functional.pad(a_RI, (0, 0, 0, columns - len(a_RI))).to(weight_OI.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self._weight_OK.dtype)
        wide = torch.cat([wide, functional.linear(wide, self._a_SI)], -1)
        return functional.linear(wide, self._weight_OK, self._base.bias).to(x.dtype)


class _Dequantised:
    """A 4-bit weight, which is dense only while it is used, and not at all in a step of decoding."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._frozen = module, Frozen(module.get_base_layer())

    def __call__(self, x: Tensor) -> Tensor:
        if self._module.training or x.numel() >= FEW_ROWS * x.shape[-1]:
            return _outputs([self._module], [self._frozen], x)[0]
        return self._few_rows(x)

    def _few_rows(self, x: Tensor) -> Tensor:
        """Summed in float32, rounded once."""
        module, name = self._module, _active_adapter(self._module)
        x_TI = x.reshape(-1, x.shape[-1]).float()
        low_TR = x_TI @ module.lora_A[name].weight.float().T
        term_TO = low_TR @ module.lora_B[name].weight.float().T
        output_TO = self._frozen.few_rows(x_TI) + module.scaling[name] * term_TO
        return output_TO.view(*x.shape[:-1], -1).to(x.dtype)


def _is_special(module: nn.Module, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether peft must compute this call: other arguments, no rows, or not just one adapter beside the base."""
    has_more = bool(args) or any(value is not None for value in kwargs.values())
    return has_more or not x.numel() or not _active_adapter(module)


def _outputs(members: Sequence[nn.Module], frozen: Sequence[Frozen], x: Tensor) -> list[Tensor]:
    """What each member makes of x, in x's dtype."""
    names = [_active_adapter(member) for member in members]
    pairs = list(zip(members, names, strict=True))
    drop = members[0].lora_dropout[names[0]]
    matrices = [member.lora_A[name].weight for member, name in pairs]
    probability = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    group = Group(frozen, members[0].scaling[names[0]], probability)
    dtype = _compute_dtype(frozen[0].base, x)
    matrices += [member.lora_B[name].weight for member, name in pairs]
    return [output.to(x.dtype) for output in Projections.apply(x.to(dtype), group, *matrices)]


def _active_adapter(module: nn.Module) -> str | None:
    """Name of the one adapter that is added to the base, None where there are several, none, or a merged one."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    return names[0] if len(names) == 1 and not module.disable_adapters and not module.merged else None


def _scaling(module: nn.Module) -> float | None:
    """lora_alpha / lora_rank or what else peft has made of them; None without one active adapter."""
    name = _active_adapter(module)
    return None if name is None else module.scaling[name]


def _compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return (base.compute_dtype if is_4bit(base) else base.weight.dtype) or x.dtype


@dataclass(frozen=True)
class Group:
    """What the projections of one input are multiplied with, besides their LoRA matrices."""

    frozen: Sequence[Frozen]
    scaling: float
    dropout: float

    @property
    def fp8_backward(self) -> bool:
        """Whether all layers have what the FP8 product needs."""
        return all(frozen.scale is not None for frozen in self.frozen)


class Projections(torch.autograd.Function):
    """`apply(x, group, A_1 .. A_n, B_1 .. B_n)`: outputs of a group's n projections, x in the dtype computed with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *matrices: Tensor) -> tuple[Tensor, ...]:
        """x (..., I), A (R, I), B (O, R) -> n outputs (..., O)."""
        x_TI = x.reshape(-1, x.shape[-1])
        count = len(group.frozen)
        ctx.group, ctx.shape = group, x.shape
        ctx.compute, sources = split_recipe(x)
        ctx.num_sources = len(sources)
        ctx.seed = draw_seed() if group.dropout else 0
        a_SI = _stacked(matrices[:count], x.dtype)
        low_TS = x_TI.new_empty(len(x_TI), len(a_SI))
        _scaled_product(low_TS, dropout(x_TI, group.dropout, ctx.seed), a_SI.T, group.scaling)
        outputs, lows = [], _parts(low_TS, matrices[:count], 1)
        wide_TK = widened(x_TI, lows[0], max(map(len, matrices[:count])))
        for number, (frozen, low_TR, b_OR) in enumerate(zip(group.frozen, lows, matrices[count:], strict=True)):
            if number:  # what a larger rank before left behind these columns is multiplied with zeros
                wide_TK[:, x.shape[-1] : x.shape[-1] + low_TR.shape[1]] = low_TR
            output_TO = frozen.forward(wide_TK, b_OR)
            outputs.append(output_TO.view(*x.shape[:-1], -1))
        ctx.save_for_backward(*sources, low_TS, *matrices)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of every A and of every B."""
        saved = ctx.saved_tensors  # unpacked once: a recomputed layer gives them only once
        low_TS, *matrices = saved[ctx.num_sources :]
        x_TI = ctx.compute(*saved[: ctx.num_sources]).reshape(-1, ctx.shape[-1])
        group, dtype, count = ctx.group, x_TI.dtype, len(ctx.group.frozen)
        b_list = matrices[count:]
        grads_TO = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_low_TS = torch.empty_like(low_TS)
        for part, grad, b_OR in zip(_parts(grad_low_TS, matrices[:count], 1), grads_TO, b_list, strict=True):
            _scaled_product(part, grad, b_OR.to(dtype), group.scaling)
        lows = _parts(low_TS, matrices[:count], 1)
        grads_b = [(grad.T @ low).to(b.dtype) for grad, low, b in zip(grads_TO, lows, b_list, strict=True)]
        grad_a_SI = (grad_low_TS.T @ dropout(x_TI, group.dropout, ctx.seed)).to(matrices[0].dtype)
        grads_a = _parts(grad_a_SI, matrices[:count], 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            a_SI = _stacked(matrices[:count], dtype)
            grad_x = _input_gradient(group, grads_TO, grad_low_TS, a_SI, ctx.seed).view(ctx.shape)
        return grad_x, None, *grads_a, *grads_b


def _input_gradient(group: Group, grads_TO: Sequence[Tensor], grad_low_TS: Tensor, a_SI: Tensor, seed: int) -> Tensor:
    """(T, I), through the frozen weights and through the adapters."""
    if group.fp8_backward:
        total_TI = fp8_input_gradient(group.frozen, grads_TO)
        if not group.dropout:
            return total_TI.addmm_(grad_low_TS, a_SI)
        return total_TI.add_(dropout(grad_low_TS @ a_SI, group.dropout, seed))
    total_TI = dropout(grad_low_TS @ a_SI, group.dropout, seed)
    for frozen, grad_TO in zip(group.frozen, grads_TO, strict=True):
        total_TI = frozen.add_input_gradient(total_TI, grad_TO)
    return total_TI


def _parts(whole: Tensor, a_list: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """What belongs to each A (R, I): `whole` cut by their ranks along `dim`."""
    return whole.split([len(a_RI) for a_RI in a_list], dim)


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(S, I): the A of a group one below the other."""
    return (matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))).to(dtype)


def _scaled_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out = scaling * left right, rounded once; `out` may be columns of a wider tensor."""
    out.addmm_(left, right, beta=0, alpha=scaling)
