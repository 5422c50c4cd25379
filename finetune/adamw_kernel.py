"""The Triton kernel of finetune.optimizers: AdamW on bfloat16 numbers, rounded stochastically. Needs triton."""

import triton
import triton.language as tl


@triton.jit
def _round(wide, random):
    """fp32 -> bfloat16: 16 random bits below, the lower half cut off; what is not finite stays."""
    bits = wide.to(tl.uint32, bitcast=True)
    rounded = ((bits + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, wide).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def adamw(
    weight_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    rate,
    keep,
    beta1,
    beta2,
    correction,
    eps,
    seed,
    count,
    BLOCK: tl.constexpr,
):
    """One block of elements: moments, weight, each read and written once."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    mean = tl.load(mean_ptr + offsets, mask=mask).to(tl.float32)
    square = tl.load(square_ptr + offsets, mask=mask).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=mask).to(tl.float32)
    mean = beta1 * mean + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad * grad
    weight = weight * keep - rate * mean / (tl.sqrt(square) * correction + eps)
    random0, random1, random2, _ = tl.randint4x(seed, offsets.to(tl.int32))
    tl.store(mean_ptr + offsets, _round(mean, random0.to(tl.uint32, bitcast=True)), mask=mask)
    tl.store(square_ptr + offsets, _round(square, random1.to(tl.uint32, bitcast=True)), mask=mask)
    tl.store(weight_ptr + offsets, _round(weight, random2.to(tl.uint32, bitcast=True)), mask=mask)
