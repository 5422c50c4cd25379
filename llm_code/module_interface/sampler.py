"""The next token of every row, chosen with the row's own parameters in one pass over all rows.

Randomness is a function of (the request's seed, number of the token) and needs no generator: the same request draws
the same numbers in any company and on any device. Its scores are the same too in float32, up to the last bits; in 16
bit on a GPU they depend on how many rows are computed together, so there a text may differ, rarely.
Dimensions: R rows, V vocabulary, K candidates or alternatives.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_code.module_interface.interface import SamplingParams
from llm_code.module_interface.slots import Slots, has_penalties, temperature_of

CANDIDATES = 256  # on a CPU the cuts are looked for among so many first; rows that need more are sorted


@dataclass(frozen=True)
class Needs:
    """What the rows of a step ask for together; what no row needs is not computed."""

    sampling: bool = False
    top_k: bool = False
    top_p: bool = False
    penalties: bool = False
    bias: bool = False
    min_tokens: bool = False
    num_alternatives: int | None = None  # None: no log-probabilities

    @staticmethod
    def of(rows: Iterable[SamplingParams]) -> "Needs":
        rows = list(rows)
        asked = [p.logprobs for p in rows if p.logprobs is not None]
        sampled = [p for p in rows if temperature_of(p) > 0]
        return Needs(
            sampling=bool(sampled),
            top_k=any(p.top_k > 0 for p in sampled),
            top_p=any(p.top_p < 1 for p in sampled),
            penalties=any(map(has_penalties, rows)),
            bias=any(p.logit_bias for p in rows),
            min_tokens=any(p.min_tokens for p in rows),
            num_alternatives=max(asked) if asked else None,
        )


@dataclass(frozen=True)
class Sampled:
    """Tokens (R,), -1 where the scores were no numbers; log-probabilities (R,) and alternatives (R, K) if asked for."""

    tokens: Tensor
    logprobs: Tensor | None = None
    alternatives: Tensor | None = None
    alternative_logprobs: Tensor | None = None


def sample(logits_RV: Tensor, rows: Tensor, needs: Needs, slots: Slots, end_ids: Tensor) -> Sampled:
    """Choose a token for each row; `rows` are the slots they belong to. Changes no state (see Slots.advance)."""
    logits_RV = logits_RV.float()
    scores_RV = _adjust(logits_RV, rows, needs, slots, end_ids)
    best, tokens = scores_RV.max(-1)
    if needs.sampling:
        temperature = slots.temperature[rows]
        drawn = _draw(scores_RV, temperature, rows, needs, slots)
        tokens = torch.where(temperature > 0, drawn, tokens)
    tokens = torch.where(best.isfinite(), tokens, -1)
    if needs.num_alternatives is None:
        return Sampled(tokens)
    return Sampled(tokens, *log_probabilities(logits_RV, tokens.clamp(min=0), needs.num_alternatives))


def log_probabilities(logits_RV: Tensor, tokens: Tensor, num_alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `tokens`, the likeliest alternatives and theirs."""
    total = logits_RV.logsumexp(-1)
    chosen = logits_RV.gather(-1, tokens[:, None])[:, 0] - total
    top = logits_RV.topk(num_alternatives, dim=-1)
    return chosen, top.indices, top.values - total[:, None]


def _adjust(logits_RV: Tensor, rows: Tensor, needs: Needs, slots: Slots, end_ids: Tensor) -> Tensor:
    """Scores after penalties, bias and min_tokens."""
    scores = logits_RV
    if needs.penalties:
        # join clears the matrices' rows only for requests that use them: the others may hold an earlier request's
        ours = slots.penalised[rows, None]
        counts = torch.where(ours, slots.counts[rows], 0)
        seen = ours & slots.in_prompt[rows] | (counts > 0)
        penalty = slots.repetition[rows, None]
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        scores = scores - slots.frequency[rows, None] * counts - slots.presence[rows, None] * (counts > 0)
    if needs.bias:
        scores = scores + torch.where(slots.biased[rows, None], slots.bias[rows], 0)
    if needs.min_tokens and len(end_ids):
        scores = scores.clone() if scores is logits_RV else scores
        early = slots.generated[rows] < slots.min_tokens[rows]
        scores[:, end_ids] = scores[:, end_ids].masked_fill(early[:, None], -torch.inf)
    return scores


def _draw(scores_RV: Tensor, temperature: Tensor, rows: Tensor, needs: Needs, slots: Slots) -> Tensor:
    """One token per row by its distribution: the first at which the cumulative probability exceeds a random number."""
    probs_RV = (scores_RV / torch.where(temperature > 0, temperature, 1)[:, None]).softmax(-1)
    if needs.top_k or needs.top_p:
        cuts = (slots.top_k[rows] if needs.top_k else None, slots.top_p[rows] if needs.top_p else None)
        threshold = cut_thresholds(probs_RV, *cuts)
        probs_RV = torch.where(probs_RV >= threshold[:, None], probs_RV, 0)
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    point = uniform(slots.seed[rows], slots.generated[rows]) * cumulative_RV[:, -1]
    tokens = (cumulative_RV <= point[:, None]).sum(-1)
    return torch.where(tokens < probs_RV.shape[-1], tokens, probs_RV.argmax(-1))


def uniform(seed: Tensor, number: Tensor) -> Tensor:
    """Float64 numbers in [0, 1): splitmix64's output function over (seed, number)."""
    bits = seed + (number + 1) * -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
    bits = (bits ^ _shift(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shift(bits, 27)) * -0x6B2FB644ECCEEE15
    bits = bits ^ _shift(bits, 31)
    return _shift(bits, 11).double() * 2.0**-53


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right of signed 64-bit numbers."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def cut_thresholds(probs_RV: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The smallest probability (R,) that stays: first the top_k likeliest, then of those the fewest that hold top_p.

    Tokens as likely as the last that stays, stay too. top_k 0 and top_p 1 cut nothing, nor does None in any row.
    """
    if probs_RV.is_cuda:
        return _thresholds_by_bisection(probs_RV, top_k, top_p)
    top_k = probs_RV.new_zeros(len(probs_RV), dtype=torch.int64) if top_k is None else top_k
    top_p = probs_RV.new_ones(len(probs_RV)) if top_p is None else top_p
    threshold, resolved = _thresholds_among(probs_RV, top_k, top_p, min(CANDIDATES, probs_RV.shape[-1]))
    if not resolved.all():
        rest = (~resolved).nonzero()[:, 0]
        threshold[rest] = _thresholds_among(probs_RV[rest], top_k[rest], top_p[rest], probs_RV.shape[-1])[0]
    return threshold


def _thresholds_among(probs_RV: Tensor, top_k: Tensor, top_p: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Thresholds found among the `size` likeliest tokens, and for which rows those were enough."""
    values_RK = probs_RV.topk(size, dim=-1).values
    masses_RK = values_RK.cumsum(-1)
    limited = (top_k > 0) & (top_k < probs_RV.shape[-1])
    last = torch.where(limited, top_k, size).clamp(max=size) - 1
    mass = torch.where(limited, masses_RK.gather(-1, last[:, None])[:, 0], probs_RV.sum(-1))
    needed = (masses_RK < (top_p * mass)[:, None]).sum(-1)
    place = torch.minimum(torch.where(top_p < 1, needed, size), last)
    threshold = values_RK.gather(-1, place[:, None])[:, 0]
    nothing_cut = (top_p >= 1) & ~limited
    complete = size == probs_RV.shape[-1]
    resolved = nothing_cut | (limited & (top_k <= size)) | ((top_p < 1) & ~limited & (needed < size)) | complete
    return torch.where(nothing_cut, 0, threshold), resolved


def _thresholds_by_bisection(probs_RV: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The same without sorting or looking at a value on the host: bisection over the floats' bit patterns, exact."""
    threshold, kept_RV = probs_RV.new_zeros(len(probs_RV)), probs_RV
    if top_k is not None:
        limited = (top_k > 0) & (top_k < probs_RV.shape[-1])
        threshold = torch.where(limited, _largest_with(probs_RV, torch.ones_like(probs_RV), top_k.float()), 0)
        kept_RV = torch.where(probs_RV >= threshold[:, None], probs_RV, 0)
    if top_p is not None:
        nucleus = _largest_with(probs_RV, kept_RV, top_p * kept_RV.sum(-1))
        threshold = torch.where(top_p < 1, torch.maximum(threshold, nucleus), threshold)
    return threshold


def _largest_with(probs_RV: Tensor, weights_RV: Tensor, target: Tensor) -> Tensor:
    """The largest t (R,) with sum(weights where probs >= t) >= target; positive floats sort like their bits."""
    bits_RV = probs_RV.contiguous().view(torch.int32)
    low = torch.zeros_like(target, dtype=torch.int32)
    high = bits_RV.amax(-1)
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = torch.where(bits_RV >= middle[:, None], weights_RV, 0).sum(-1) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low.view(torch.float32)
