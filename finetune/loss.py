"""The training loss of a causal model without its (T, V) logits: the head sees supervised positions only, in chunks.

`enable_chunked_loss(model)` gives the model's own forward this loss, so peft, DDP and DeepSpeed, which all call
`model(**batch)`, have it too. The loss is a SUM over supervised tokens; the trainer divides it by the update's count.

The work is done inside `lm_head`'s forward. ZeRO-3 gathers a parameter around the forward and backward pass of the
module that owns it, and nowhere else, so the head must be called as a module. Gradients are computed in the forward
pass, while a chunk's logits are there, and scaled in the backward pass: three products a chunk where recomputation
needs four, and no use of the head's weight outside its own forward.

Dimensions: T = tokens, N = supervised tokens, C = rows of a chunk, V = vocabulary, H = hidden size.
"""

import math
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutputWithPast

from finetune.batching import IGNORE_INDEX
from finetune.errors import UserError
from finetune.optional import kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's default, which NormHead uses


@dataclass
class SummedLossOutput(CausalLMOutputWithPast):
    """`loss` is the fp32 sum over the `num_tokens` (on the CPU) supervised positions; `logits` stay None."""

    num_tokens: Tensor | None = None


def enable_chunked_loss(
    model: "PreTrainedModel", chunk_rows: int = 1024, normalize_head: bool = False
) -> "PreTrainedModel":
    """Make `model(input_ids=..., labels=...)` return a SummedLossOutput; without labels the model answers as before.

    `labels` are aligned with `input_ids`, -100 where unsupervised; `targets` and `target_positions` of
    finetune.batching.collate spare the loss a wait for the device. `normalize_head` divides each row of the head by its
    L2 norm in every loss, with the exact gradient (Baichuan2's NormHead). `model` is the causal model itself: call this
    before peft or DeepSpeed wrap it. Raises UserError for a model without `model` and a bias-free `lm_head`.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or not hasattr(model, "model"):
        raise UserError(
            f"the chunked loss needs `.model` and a bias-free `.lm_head`; {type(model).__name__} lacks them."
        )
    if not hasattr(model, "_forward_with_logits"):
        model._forward_with_logits, model.forward = model.forward, MethodType(_model_forward, model)
        head._forward_all, head.forward = head.forward, MethodType(_head_forward, head)
    head._chunk_rows, head._normalize = chunk_rows, normalize_head
    return model


def _model_forward(
    self: "PreTrainedModel",
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    target_positions: Tensor | None = None,
    targets: Tensor | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    if labels is None:
        return self._forward_with_logits(**inputs, **kwargs)
    # The count that transformers' trainer offers is its own loss's divisor, and a cache would join packed rows.
    for name in ("num_items_in_batch", "use_cache", "logits_to_keep", "return_dict"):
        kwargs.pop(name, None)
    hidden_BTH = self.model(**inputs, use_cache=False, **kwargs).last_hidden_state
    if targets is None:
        target_positions, targets = _targets_of(labels)
    loss = self.lm_head(hidden_BTH.flatten(0, 1).index_select(0, target_positions), targets)
    return SummedLossOutput(loss=loss, num_tokens=torch.tensor(len(targets)))


def _targets_of(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(positions that predict a supervised token, those tokens), over all rows. Waits for the device."""
    targets_BT = torch.full_like(labels_BT, IGNORE_INDEX)
    targets_BT[:, :-1] = labels_BT[:, 1:]
    flat = targets_BT.flatten()
    positions = torch.nonzero(flat != IGNORE_INDEX).flatten()
    return positions, flat[positions]


def _head_forward(self: nn.Linear, hidden: Tensor, targets_N: Tensor | None = None) -> Tensor:
    """Logits of `hidden`, or with targets the summed loss of hidden (N, H)."""
    if targets_N is None:
        return self._forward_all(hidden)
    # ZeRO-3 takes the weight away between forward and backward pass: there all is computed in the forward pass.
    is_partitioned = hasattr(self.weight, "ds_id")
    if self._normalize and hidden.is_cuda and not is_partitioned and kernels():
        return summed_cross_entropy(hidden, UnitRows.apply(self.weight), targets_N, self._chunk_rows)
    return summed_cross_entropy(hidden, self.weight, targets_N, self._chunk_rows, self._normalize)


class UnitRows(torch.autograd.Function):
    """`apply(weight_VH)`: its rows divided by their L2 norms, in its own dtype, with the exact gradient; CUDA."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor) -> Tensor:
        """(V, H); beside the weight only V inverse norms are kept."""
        unit_VH, scale_V = kernels().unit_rows(weight_VH, SMALLEST_NORM)
        ctx.save_for_backward(weight_VH, scale_V)
        return unit_VH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VH: Tensor) -> Tensor:
        """Takes the place of the incoming gradient, the largest tensor of the pass: the loss alone made it."""
        weight_VH, scale_V = ctx.saved_tensors
        return kernels().through_unit_rows_(grad_VH.contiguous(), weight_VH, scale_V, 1 / SMALLEST_NORM)


def summed_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk_rows: int = 1024, normalize: bool = False
) -> Tensor:
    """fp32 scalar: the sum of cross-entropies of `hidden_NH @ weight_VH.T`.

    `normalize` divides the weight's rows by their L2 norms. Products run in the weight's dtype (autocast's where it is
    on), the softmax in fp32. N = 0 gives an exact 0 with a graph whose gradients are zeros, so that data-parallel ranks
    without supervised tokens stay in step.
    """
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
    with torch.autocast(device, enabled=False):
        return _SummedCrossEntropy.apply(
            hidden_NH, weight_VH, targets_N, chunk_rows, normalize, dtype, torch.is_grad_enabled()
        )


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        chunk_rows: int,
        normalize: bool,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        weight = weight_VH.to(dtype)
        wants_hidden, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VH) if wants_weight else None
        scale_V1 = _inverse_norms(weight_VH) if normalize else None
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        # Equal chunks: a last one of a few rows would read the whole head for them.
        num_chunks = max(1, math.ceil(len(targets_N) / chunk_rows))
        results = hidden_NH if grad_hidden is None else grad_hidden
        parts = (tensor.tensor_split(num_chunks) for tensor in (hidden_NH, targets_N, results))
        for hidden_CH, targets_C, result_CH in zip(*parts, strict=True):
            hidden_CH = hidden_CH.to(dtype)
            logits_CV = hidden_CH @ weight.T
            if scale_V1 is None and logits_CV.is_cuda and (triton := kernels()):
                chunk_loss, grad_CV = triton.cross_entropy_(logits_CV, targets_C)
            else:
                logits_CV = logits_CV.float() if scale_V1 is None else logits_CV.float().mul_(scale_V1.T)
                chunk_loss, grad_CV = _cross_entropy_(logits_CV, targets_C)
            loss += chunk_loss
            if grad_weight is not None:
                _add_product_(grad_weight, grad_CV.to(dtype).T, hidden_CH)
            if grad_hidden is not None:
                grad_CV = grad_CV if scale_V1 is None else grad_CV.mul_(scale_V1.T)
                result_CH.copy_(grad_CV.to(dtype) @ weight)
        if grad_weight is not None and scale_V1 is not None:
            _through_normalization_(grad_weight, weight_VH, scale_V1)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: for a trainable head this is the largest tensor of the pass. A second backward pass is refused by
        # autograd's version check.
        grads = (None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _cross_entropy_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of fp32 logits and its gradient, which takes the logits' place in memory."""
    logits_CV -= logits_CV.amax(dim=1, keepdim=True)
    targets_C1 = targets_C[:, None]
    chosen_C1 = logits_CV.gather(1, targets_C1)
    sums_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
    grad_CV = logits_CV.div_(sums_C1)
    grad_CV.scatter_add_(1, targets_C1, -torch.ones_like(chosen_C1))
    return (sums_C1.log() - chosen_C1).sum(), grad_CV


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _inverse_norms(weight_VH: Tensor) -> Tensor:
    """fp32 (V, 1); no normalised copy of the weight is made, logits are scaled instead."""
    return torch.linalg.vector_norm(weight_VH, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(SMALLEST_NORM) ** -1


def _through_normalization_(grad_VH: Tensor, weight_VH: Tensor, scale_V1: Tensor, rows: int = 8192) -> None:
    """Turn the gradient of the rows u = w / |w| into that of w: (g - u (u . g)) / |w|, a few rows at a time."""
    for grad, weight, scale in zip(grad_VH.split(rows), weight_VH.split(rows), scale_V1.split(rows), strict=True):
        unit, wide = weight.float() * scale, grad.float()
        # A row shorter than SMALLEST_NORM is divided by that constant, not by its norm.
        along = (unit * wide).sum(dim=1, keepdim=True) * (scale < 1 / SMALLEST_NORM)
        grad.copy_((wide - unit * along) * scale)
