"""Triton kernels for what lies between the matrix products: each replaces a handful of PyTorch's launches by one.

Same signatures and results as Operations' methods; gpu_operations.py checks them against those before they are used.
Dimensions as there. Only importable where triton is installed (it comes with PyTorch's CUDA wheels).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit
def _add_norm(x, residual, weight, normed, total, width, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0)
    if ADD:
        before = tl.load(residual + row * width + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * width + columns, values, mask=inside)
    exact = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(exact * exact, axis=0) / width + epsilon)
    # rounded before the weight as the models' own norms do it
    rounded = (exact * scale).to(x.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + columns, (rounded * gain).to(x.dtype.element_ty), mask=inside)


def add_norm(x_TC: Tensor, residual_TC: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual) for a root-mean-square norm with a weight."""
    x_TC = x_TC.contiguous()
    rows, width = x_TC.shape
    normed_TC = torch.empty_like(x_TC)
    total_TC = x_TC if residual_TC is None else torch.empty_like(x_TC)
    before_TC = x_TC if residual_TC is None else residual_TC
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x_TC,
        before_TC,
        norm.weight,
        normed_TC,
        total_TC,
        width,
        norm.variance_epsilon,
        ADD=residual_TC is not None,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
    )
    return normed_TC, total_TC


@triton.jit
def _gate(gate_up, output, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(output + row * width + columns, (active * up).to(gate_up.dtype.element_ty), mask=inside)


def gate(gate_up_TC: Tensor, activation: Any) -> Tensor:
    """silu(gate) * up for gate and up side by side."""
    gate_up_TC = gate_up_TC.contiguous()
    rows, width = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    output_TC = gate_up_TC.new_empty(rows, width)
    _gate[(rows, triton.cdiv(width, 1024))](gate_up_TC, output_TC, width, BLOCK=1024)
    return output_TC


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    queries,
    cache,
    places,
    value_offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < NUM_HEADS + 2 * NUM_KV) & (column < SIZE // 2)
    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV) + head) * SIZE + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    turn = head < NUM_HEADS + NUM_KV
    angle = token * SIZE + column
    cos_first = tl.load(cos + angle, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + SIZE // 2, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + SIZE // 2, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    turned_first = tl.where(turn, first * cos_first - second * sin_first, first).to(qkv.dtype.element_ty)
    turned_second = tl.where(turn, second * cos_second + first * sin_second, second).to(qkv.dtype.element_ty)
    place = tl.load(places + token)
    is_query = head < NUM_HEADS
    query = queries + (token * NUM_HEADS + head) * SIZE + column
    tl.store(query, turned_first, mask=inside & is_query)
    tl.store(query + SIZE // 2, turned_second, mask=inside & is_query)
    key_head = tl.where(turn, head - NUM_HEADS, head - NUM_HEADS - NUM_KV)
    target = cache + tl.where(turn, 0, value_offset) + (place * NUM_KV + key_head) * SIZE + column
    tl.store(target, turned_first, mask=inside & (is_query == 0))
    tl.store(target + SIZE // 2, turned_second, mask=inside & (is_query == 0))


def rotate_and_store(
    qkv_THD: Tensor,
    num_heads: int,
    norms: tuple[Any, Any],
    cos_TD: Tensor,
    sin_TD: Tensor,
    keys_values: Tensor,
    places_T: Tensor,
) -> Tensor:
    """Rotated queries (T, H, D); rotated keys and values go to their places in the pool."""
    tokens, all_heads, size = qkv_THD.shape
    num_kv = (all_heads - num_heads) // 2
    if norms[0] is not None:
        q_THD, k_TGD, v_TGD = qkv_THD.split([num_heads, num_kv, num_kv], dim=1)
        qkv_THD = torch.cat([norms[0](q_THD), norms[1](k_TGD), v_TGD], dim=1)
    qkv_THD = qkv_THD.contiguous()
    queries_THD = qkv_THD.new_empty(tokens, num_heads, size)
    _rotate_and_store[(tokens, triton.cdiv(all_heads, 8))](
        qkv_THD,
        cos_TD,
        sin_TD,
        queries_THD,
        keys_values,
        places_T,
        keys_values.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        SIZE=size,
        HEADS=8,
        HALF=triton.next_power_of_2(size // 2),
    )
    return queries_THD


@triton.jit
def _attend_split(
    queries,
    cache,
    starts,
    lengths,
    sums,
    peaks,
    totals,
    scaling,
    value_offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One request, one key head, one part of its tokens: the running softmax of the head's group of queries."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    start = tl.load(starts + row)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * part
    end = tl.minimum(begin + part, length)
    group, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = kv_head * GROUP + group
    here = (group[:, None] < GROUP) & (column[None, :] < SIZE)
    query = tl.load(queries + (row * NUM_HEADS + head[:, None]) * SIZE + column[None, :], mask=here, other=0.0)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    answer = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        address = cache + ((start + token[:, None]) * NUM_KV + kv_head) * SIZE + column[None, :]
        known = (token[:, None] < end) & (column[None, :] < SIZE)
        key = tl.load(address, mask=known, other=0.0)
        value = tl.load(address + value_offset, mask=known, other=0.0)
        if ROWS == 1:
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)[None, :] * scaling
        else:
            score = tl.dot(query, tl.trans(key), input_precision="ieee").to(tl.float32) * scaling
        score = tl.where(token[None, :] < end, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp(score - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(weight, axis=1)
        if ROWS == 1:
            added = tl.sum(tl.trans(weight) * value.to(tl.float32), axis=0)[None, :]
        else:
            added = tl.dot(weight.to(value.dtype), value, input_precision="ieee").to(tl.float32)
        answer = answer * shrink[:, None] + added
        peak = new_peak
    place = (row * NUM_HEADS + head) * SPLITS + split
    tl.store(peaks + place, peak, mask=group < GROUP)
    tl.store(totals + place, total, mask=group < GROUP)
    tl.store(sums + place[:, None] * SIZE + column[None, :], answer, mask=here)


@triton.jit
def _join_splits(sums, peaks, totals, output, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    inside = column < SIZE
    peak = tl.load(peaks + head * SPLITS + split)
    weight = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(tl.load(totals + head * SPLITS + split) * weight, axis=0)
    places = (head * SPLITS + split[:, None]) * SIZE + column[None, :]
    parts = tl.load(sums + places, mask=inside[None, :], other=0.0)
    answer = tl.sum(parts * weight[:, None], axis=0) / total
    tl.store(output + head * SIZE + column, answer.to(output.dtype.element_ty), mask=inside)


def num_splits(rows: int, num_kv_heads: int) -> int:
    """Parts of each request's tokens such that about four programs fall to each of a large card's processors."""
    wanted = max(528 // max(rows * num_kv_heads, 1), 1)
    return min(1 << (wanted.bit_length() - 1), 32)


def attend_decode(
    q_BHD: Tensor, keys_values: Tensor, starts_B: Tensor, lengths_B: Tensor, places: Any, scaling: float
) -> Tensor:
    """(B, H, D): one query each against `length` tokens from `start`; nothing is needed from the host."""
    q_BHD = q_BHD.contiguous()
    rows, heads, size = q_BHD.shape
    num_kv = keys_values.shape[2]
    group, splits, width = heads // num_kv, num_splits(rows, num_kv), triton.next_power_of_2(size)
    parts = q_BHD.new_empty((rows, heads, splits, size), dtype=torch.float32)
    peaks, totals = (q_BHD.new_empty((rows, heads, splits), dtype=torch.float32) for _ in range(2))
    output_BHD = torch.empty_like(q_BHD)
    shape = {"SIZE": size, "WIDTH": width, "SPLITS": splits}
    _attend_split[(rows, num_kv, splits)](
        q_BHD,
        keys_values,
        starts_B,
        lengths_B,
        parts,
        peaks,
        totals,
        scaling,
        keys_values.stride(0),
        NUM_HEADS=heads,
        NUM_KV=num_kv,
        GROUP=group,
        ROWS=1 if group == 1 else max(16, triton.next_power_of_2(group)),
        BLOCK=64 if group == 1 else 32,
        **shape,
    )
    _join_splits[(rows * heads,)](parts, peaks, totals, output_BHD, **shape)
    return output_BHD
