"""Triton kernels of training: seeded dropout, 4-bit weights made dense, gradients to 8-bit floating point, rows to unit
length, cross-entropy.

Each reads and writes every number once. Needs triton; tests/test_kernels.py compares them with plain PyTorch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_LARGEST = tl.constexpr(448.0)


@triton.jit
def _keep_two_blocks(x_ptr, out_ptr, first, count, random, dropped, factor, BLOCK: tl.constexpr):
    """One block decided by the lower halves of `random`, the next by the upper ones."""
    bits = random.to(tl.uint32, bitcast=True)
    for half in tl.static_range(2):
        offsets = first + half * BLOCK
        mask = offsets < count
        x = tl.load(x_ptr + offsets, mask=mask)
        is_kept = ((bits >> (16 * half)) & 0xFFFF).to(tl.int32) >= dropped
        tl.store(out_ptr + offsets, tl.where(is_kept, x.to(tl.float32) * factor, 0.0).to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["seed", "dropped"])
def _seeded_dropout(x_ptr, out_ptr, count, seed, dropped, factor, BLOCK: tl.constexpr):
    """Eight blocks of elements a program: one draw of 4 x 32 bits decides about eight elements."""
    lane = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    random0, random1, random2, random3 = tl.randint4x(seed, program * BLOCK + lane)
    first = program.to(tl.int64) * (8 * BLOCK) + lane
    _keep_two_blocks(x_ptr, out_ptr, first, count, random0, dropped, factor, BLOCK)
    _keep_two_blocks(x_ptr, out_ptr, first + 2 * BLOCK, count, random1, dropped, factor, BLOCK)
    _keep_two_blocks(x_ptr, out_ptr, first + 4 * BLOCK, count, random2, dropped, factor, BLOCK)
    _keep_two_blocks(x_ptr, out_ptr, first + 6 * BLOCK, count, random3, dropped, factor, BLOCK)


def seeded_dropout(x: Tensor, dropped: int, factor: float, seed: int) -> Tensor:
    """x * factor where 16 random bits are `dropped` or more, else 0; x contiguous on CUDA."""
    out, block = torch.empty_like(x), 512
    with torch.cuda.device(x.device):
        _seeded_dropout[(triton.cdiv(x.numel(), 8 * block),)](
            x, out, x.numel(), seed, dropped, factor, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _largest(row_ptr, size: tl.constexpr, BLOCK: tl.constexpr):
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    return tl.max(largest)


@triton.jit
def _divide(row_ptr, out_ptr, size: tl.constexpr, scale, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, (x / scale).to(out_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _rows_to_fp8(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    out_ptr,
    scale_ptr,
    stride0,
    stride1,
    stride2,
    size0: tl.constexpr,
    size1: tl.constexpr,
    size2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads a row twice; few programs at a time, so that the second time it is still in the cache."""
    row = tl.program_id(0).to(tl.int64)
    x0_ptr += row * stride0
    x1_ptr += row * stride1
    x2_ptr += row * stride2
    out_ptr += row * (size0 + size1 + size2)
    largest = tl.maximum(_largest(x0_ptr, size0, BLOCK), _largest(x1_ptr, size1, BLOCK))
    largest = tl.maximum(largest, _largest(x2_ptr, size2, BLOCK))
    scale = tl.maximum(largest, 1e-12) / FP8_LARGEST
    _divide(x0_ptr, out_ptr, size0, scale, BLOCK)
    _divide(x1_ptr, out_ptr + size0, size1, scale, BLOCK)
    _divide(x2_ptr, out_ptr + size0 + size1, size2, scale, BLOCK)
    tl.store(scale_ptr + row, scale)


def rows_to_fp8(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(float8_e4m3 (T, K), float32 scales (T, 1)) whose product is about the parts (T, K_i) side by side.

    One to three parts; a row's largest number over all of them becomes 448.
    """
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    sizes = [part.shape[1] for part in parts] + [0] * (3 - len(parts))
    three = (*parts, *parts[:1] * (3 - len(parts)))
    count, device = len(parts[0]), parts[0].device
    out = torch.empty(count, sum(sizes), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        _rows_to_fp8[(count,)](
            *three, out, scales, *(part.stride(0) for part in three), *sizes, BLOCK=8192, num_warps=32
        )
    return out, scales


@triton.jit
def _nf4_to_dense(
    packed_ptr,
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,
    inverse,
    rows,
    columns,
    out_stride,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A tile of BLOCK_ROWS x (64 * GROUPS) weights times `inverse`. A byte's upper half is the first of two weights."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    block = row[:, None] * (columns // 64) + group[None, :]
    block_mask = (row[:, None] < rows) & (group[None, :] < columns // 64)
    code2 = tl.load(absmax_ptr + block, mask=block_mask, other=0).to(tl.int32)
    absmax = tl.load(code2_ptr + code2) * tl.load(absmax2_ptr + block // 256, mask=block_mask, other=0.0)
    absmax = (absmax + tl.load(offset_ptr)) * inverse

    byte = tl.program_id(1) * (32 * GROUPS) + tl.arange(0, 32 * GROUPS)
    byte_mask = (row[:, None] < rows) & (byte[None, :] < columns // 2)
    packed = tl.load(packed_ptr + row[:, None].to(tl.int64) * (columns // 2) + byte[None, :], mask=byte_mask, other=0)
    packed = packed.to(tl.int32)
    pairs = tl.join(tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15)))
    weights = tl.reshape(pairs, (BLOCK_ROWS, GROUPS, 64)) * absmax[:, :, None]
    weights = tl.reshape(weights, (BLOCK_ROWS, 64 * GROUPS)).to(out_ptr.dtype.element_ty)

    column = tl.program_id(1) * (64 * GROUPS) + tl.arange(0, 64 * GROUPS)
    if TRANSPOSED:
        mask = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(out_ptr + column[:, None].to(tl.int64) * out_stride + row[None, :], tl.trans(weights), mask=mask)
    else:
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        tl.store(out_ptr + row[:, None].to(tl.int64) * out_stride + column[None, :], weights, mask=mask)


def nf4_to_dense(weight: Any, out: Tensor, scale: float = 1.0, transposed: bool = False) -> Tensor:
    """Fill `out`, (O, I) or when `transposed` (I, O), with a double-quantised NF4 weight divided by `scale`.

    `weight` is a bitsandbytes parameter of sizes divisible by 64, in blocks of 64 weights and of 256 scales. Rows of
    `out` may lie apart.
    """
    state = weight.quant_state
    rows, columns = state.shape
    block_rows, groups = (128, 1) if transposed else (32, 4)
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(columns, 64 * groups))
    with torch.cuda.device(weight.device):
        _nf4_to_dense[grid](
            weight.data,
            state.absmax,
            state.state2.code,
            state.state2.absmax,
            state.offset,
            state.code,
            out,
            1 / scale,
            rows,
            columns,
            out.stride(0),
            TRANSPOSED=transposed,
            BLOCK_ROWS=block_rows,
            GROUPS=groups,
            num_warps=4,
        )
    return out


@triton.jit
def _unit_rows(weight_ptr, out_ptr, scale_ptr, smallest, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    weight = tl.load(weight_ptr + row * size + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(weight * weight)), smallest)
    tl.store(out_ptr + row * size + column, weight * scale, mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _through_unit_rows(grad_ptr, weight_ptr, scale_ptr, largest, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    scale = tl.load(scale_ptr + row)
    unit = tl.load(weight_ptr + row * size + column, mask=mask, other=0.0).to(tl.float32) * scale
    grad = tl.load(grad_ptr + row * size + column, mask=mask, other=0.0).to(tl.float32)
    # A row shorter than the smallest norm is divided by that constant, not by its norm.
    along = tl.where(scale < largest, tl.sum(unit * grad), 0.0)
    tl.store(grad_ptr + row * size + column, (grad - unit * along) * scale, mask=mask)


def unit_rows(weight_VH: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """((V, H) rows divided by their norms, or by `smallest` where shorter; float32 (V,) inverse norms)."""
    count, size = weight_VH.shape
    out, scales = torch.empty_like(weight_VH), torch.empty(count, dtype=torch.float32, device=weight_VH.device)
    with torch.cuda.device(weight_VH.device):
        block = triton.next_power_of_2(size)
        _unit_rows[(count,)](weight_VH, out, scales, smallest, size, BLOCK=block, num_warps=8)
    return out, scales


def through_unit_rows_(grad_VH: Tensor, weight_VH: Tensor, scale_V: Tensor, largest: float) -> Tensor:
    """The gradient of unit rows u turned into that of the weight, in place: (g - u (u . g)) / |w|."""
    count, size = weight_VH.shape
    with torch.cuda.device(weight_VH.device):
        block = triton.next_power_of_2(size)
        _through_unit_rows[(count,)](grad_VH, weight_VH, scale_V, largest, size, BLOCK=block, num_warps=8)
    return grad_VH


@triton.jit
def _cross_entropy(logits_ptr, targets_ptr, losses_ptr, size: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * size
    chosen = tl.load(logits_ptr + target).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < size, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(logits))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(logits - new))
        largest = new
    log_total = largest + tl.log(total)
    tl.store(losses_ptr + row, log_total - chosen)
    tl.debug_barrier()  # the chosen logit is read by all before it is overwritten
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < size, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logits - log_total) - tl.where(column == target, 1.0, 0.0)
        tl.store(logits_ptr + column, gradient, mask=column < size)


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 sum of losses, its gradient by the logits, which takes their place); logits contiguous."""
    count, size = logits_CV.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits_CV.device)
    if count:
        with torch.cuda.device(logits_CV.device):
            _cross_entropy[(count,)](logits_CV, targets_C, losses, size, BLOCK=8192, num_warps=16)
    return losses.sum(), logits_CV
