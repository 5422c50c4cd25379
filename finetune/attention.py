"""Attention over rows laid end to end without padding, registered in transformers under the name PADDING_FREE.

A call that passes `cu_seq_lens_q` (see `finetune.batching.collate`) attends causally inside each row: on CUDA with
PyTorch's varlen kernel, elsewhere with one exact SDPA call per row. Any other call, `generate` with left padding among
them, is transformers' own sdpa. Dimensions: B = 1 batch, H = query heads, G = key/value heads, T = tokens of all rows,
D = head size.
"""

import inspect
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PADDING_FREE = "padding_free"

# Whether the running forward pass is padding-free: transformers does not tell the mask function.
_running = threading.local()


def enable_padding_free_attention(model: "PreTrainedModel") -> "PreTrainedModel":
    """Switch a causal model (or a peft model around one) to PADDING_FREE; repeating it changes nothing.

    A padding-free call then builds no (T, T) mask and never fills a key/value cache: transformers caches by default in
    training too, and its cache treats all rows as one.
    """
    model.set_attn_implementation(PADDING_FREE)
    decoder = model.get_decoder()
    if not getattr(decoder, "_padding_free", False):
        decoder.register_forward_pre_hook(_enter, with_kwargs=True)
        decoder.register_forward_hook(_leave, always_call=True)
        decoder._padding_free = True
    return model


def _enter(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    _running.padding_free = kwargs.get("cu_seq_lens_q") is not None
    return (args, {**kwargs, "use_cache": False}) if _running.padding_free else (args, kwargs)


def _leave(decoder: nn.Module, args: tuple, output: Any) -> None:
    _running.padding_free = False


def padding_free_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' sdpa mask, or None inside a padding-free pass, where the row borders say everything."""
    return None if getattr(_running, "padding_free", False) else AttentionMaskInterface()["sdpa"](*args, **kwargs)


def padding_free_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, T, H, D) attention output for query (1, H, T, D) and key, value (1, G, T, D); rows start at `cu_seq_lens_q`.

    Raises UserError for several batch rows, a logit cap or attention sinks, which this path does not have.
    """
    if cu_seq_lens_q is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if query.shape[0] != 1 or extras:
        found = f"a model that uses {extras[0]}" if extras else f"{query.shape[0]} batch rows"
        raise UserError(f"padding-free attention expects one batch row and plain causal attention, found {found}.")
    if _has_varlen_kernel(query) and not dropout:
        output = attend_varlen(query, key, value, cu_seq_lens_q, int(max_length_q), scaling, sliding_window)
    else:
        output = attend_rows(query, key, value, cu_seq_lens_q, scaling, sliding_window, dropout)
    return output, None


def _has_varlen_kernel(query: Tensor) -> bool:
    """Flash attention's: 16 bits, heads of at most 256, cards from Ampere on."""
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    return fits and _computes_bfloat16(query.device.index)


@lru_cache
def _computes_bfloat16(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


@lru_cache(maxsize=1)
def _varlen_kernel() -> tuple[Any, frozenset[str]]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    max_length: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Output (1, T, H, D) of torch.nn.attention.varlen: a left window of -1 and a right one of 0 mean causal."""
    varlen_attn, accepted = _varlen_kernel()
    left = -1 if window is None or window >= max_length else window - 1
    # torch 2.11 has no such keyword: its kernel takes fewer key/value heads without being told.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in accepted else {}
    # Not tensor[0]: its backward pass fills a tensor with zeros and copies the gradient into it.
    query_THD, key_TGD, value_TGD = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return varlen_attn(
        query_THD,
        key_TGD,
        value_TGD,
        borders,
        borders,
        max_length,
        max_length,
        scale=scaling,
        window_size=(left, 0),
        **grouped,
    )[None]


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Output (1, T, H, D) of one causal SDPA call per row; the definition that the varlen kernel is checked against."""
    lengths = borders.diff().tolist()
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = _band(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) mask: True for the `window` keys that end at the query."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ~ones.tril(-window)


AttentionInterface.register(PADDING_FREE, padding_free_attention)
AttentionMaskInterface.register(PADDING_FREE, padding_free_mask)
