"""What lies between the matrix products, in plain PyTorch: the definition that the GPU kernels are checked against.

Dimensions: T tokens, C features, H query heads, G key/value heads, D head size, B decoding rows, N tokens of the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segment:
    """Tokens begin .. end - 1 of a step are the last of the `length` tokens that lie in the pool from `start` on."""

    begin: int
    end: int
    start: int
    length: int


class Operations:
    """Exact on any device; one attention call per request, so a request's result does not depend on its company."""

    can_capture = False  # whether a decoding step needs no number from the host

    def add_norm(self, x_TC: Tensor, residual_TC: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        total = x_TC if residual_TC is None else x_TC + residual_TC
        return norm(total), total

    def gate(self, gate_up_TC: Tensor, activation: Any) -> Tensor:
        """activation(gate) * up for gate and up side by side."""
        gate, up = gate_up_TC.chunk(2, dim=-1)
        return activation(gate) * up

    def rotate_and_store(
        self,
        qkv_THD: Tensor,
        num_heads: int,
        norms: tuple[Any, Any],
        cos_TD: Tensor,
        sin_TD: Tensor,
        keys_values: Tensor,
        places_T: Tensor,
    ) -> Tensor:
        """Rotated queries (T, H, D) of qkv (T, H + 2 G, D); rotated keys and values go to their places in the pool."""
        num_kv_heads = (qkv_THD.shape[1] - num_heads) // 2
        q_THD, k_TGD, v_TGD = qkv_THD.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms[0] is not None:
            qk_THD = torch.cat([norms[0](q_THD), norms[1](k_TGD)], dim=1)
        else:
            qk_THD = qkv_THD[:, : num_heads + num_kv_heads]
        half = qk_THD.shape[-1] // 2
        turned = torch.cat([-qk_THD[..., half:], qk_THD[..., :half]], dim=-1)
        qk_THD = qk_THD * cos_TD[:, None] + turned * sin_TD[:, None]
        keys_values[0].index_copy_(0, places_T, qk_THD[:, num_heads:])
        keys_values[1].index_copy_(0, places_T, v_TGD)
        return qk_THD[:, :num_heads]

    def attend_decode(
        self,
        q_BHD: Tensor,
        keys_values: Tensor,
        starts_B: Tensor,
        lengths_B: Tensor,
        places: Sequence[tuple[int, int]],
        scaling: float,
    ) -> Tensor:
        """(B, H, D): one query each against `length` tokens from `start`; `places` are both on the host.

        The queries of a key head are rows of one call: nothing is repeated for grouped-query heads.
        """
        heads = keys_values.shape[2]
        output = torch.empty_like(q_BHD)
        for row, (start, length) in enumerate(places):
            keys, values = keys_values[:, start : start + length].transpose(1, 2)
            query = q_BHD[row].view(1, heads, -1, q_BHD.shape[-1])
            answer = nn.functional.scaled_dot_product_attention(query, keys[None], values[None], scale=scaling)
            output[row] = answer.reshape(output.shape[1:])
        return output

    def plan_segments(self, segments: Sequence[Segment], device: torch.device) -> Any:
        """What attend_prefill takes, made once for all layers of a step."""
        return segments

    def attend_prefill(self, q_THD: Tensor, keys_values: Tensor, segments: Sequence[Segment], scaling: float) -> Tensor:
        """(T, H, D): every segment's queries causally against all its tokens so far."""
        outputs = []
        for segment in segments:
            count, start = segment.end - segment.begin, segment.start
            keys, values = keys_values[:, start : start + segment.length].transpose(1, 2)
            mask = None
            if segment.length != count and count > 1:
                mask = q_THD.new_ones(count, segment.length, dtype=torch.bool).tril(segment.length - count)
            query = q_THD[segment.begin : segment.end].transpose(0, 1)
            answer = nn.functional.scaled_dot_product_attention(
                query[None],
                keys[None],
                values[None],
                attn_mask=mask,
                is_causal=segment.length == count > 1,
                scale=scaling,
                enable_gqa=query.shape[0] != keys.shape[0],
            )
            outputs.append(answer[0].transpose(0, 1))
        return torch.cat(outputs)
