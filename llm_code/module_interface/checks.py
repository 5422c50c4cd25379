"""What a request may ask for: checked before anything is computed, the field at fault named."""

import math
from collections.abc import Sequence

from llm_code.module_interface.interface import ContextTooLong, EngineLimits, InvalidRequest, SamplingParams

RANGES = {  # inclusive
    "temperature": (0.0, 2.0),
    "repetition_penalty": (0.01, 10.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
SEEDS = (-(2**63), 2**63 - 1)


def check_request(prompt_ids: Sequence[int], params: SamplingParams, limits: EngineLimits) -> int:
    """The number of answer tokens at most. Raises InvalidRequest, ContextTooLong."""
    _check_prompt(prompt_ids, limits)
    _check_params(params, limits)
    room = limits.context - len(prompt_ids)
    max_tokens = max(room, 1) if params.max_tokens is None else params.max_tokens
    if max_tokens > room or room < 0:
        raise ContextTooLong(len(prompt_ids), max_tokens, limits.context)
    return max_tokens


def _check_prompt(prompt_ids: Sequence[int], limits: EngineLimits) -> None:
    if not prompt_ids:
        raise InvalidRequest("expected a prompt of at least one token, found none.", "prompt")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= limits.vocabulary:
        found = low if low < 0 else high
        raise InvalidRequest(f"token ids must be 0 to {limits.vocabulary - 1}, found {found}.", "prompt")


def _check_params(params: SamplingParams, limits: EngineLimits) -> None:
    for name, (low, high) in RANGES.items():
        _check_range(name, getattr(params, name), low, high)
    _check_range("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0:
        raise InvalidRequest("top_p must be greater than 0.", "top_p")
    _check_range("top_k", params.top_k, 0, math.inf)
    if params.seed is not None:
        _check_range("seed", params.seed, *SEEDS)
    fewest = 0 if params.prompt_logprobs is not None else 1
    if params.max_tokens is not None:
        _check_range("max_tokens", params.max_tokens, fewest, math.inf)
    _check_range("min_tokens", params.min_tokens, 0, params.max_tokens or math.inf)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            _check_range(name, getattr(params, name), 0, min(limits.max_logprobs, limits.vocabulary))
    if any(not stop for stop in params.stop):
        raise InvalidRequest("a stop string must not be empty.", "stop")
    for token_id, bias in params.logit_bias.items():
        _check_range("logit_bias", token_id, 0, limits.vocabulary - 1)
        _check_range("logit_bias", bias, -100, 100)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is in no range
        wanted = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise InvalidRequest(f"{name} must be {wanted}, found {value}.", name)
