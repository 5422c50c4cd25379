"""From a request's fields to the engine's sampling parameters, within what this engine can do."""

from dataclasses import replace

from llm_code.module_interface.interface import EngineLimits, SamplingParams
from llm_code.service.errors import invalid
from llm_code.service.protocol import ChatCompletionRequest, CompletionRequest, Sampling

OWN_DEFAULTS = ("temperature", "top_p", "top_k", "repetition_penalty")  # taken from the checkpoint where not given
FIELDS = (*OWN_DEFAULTS, "seed", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos")


def sampling_params(
    request: ChatCompletionRequest | CompletionRequest, defaults: SamplingParams, limits: EngineLimits
) -> SamplingParams:
    """Everything but max_tokens. Raises ApiError for what this engine's limits do not allow."""
    _check_biases(request, limits)
    given = {name: getattr(request, name) for name in FIELDS if getattr(request, name) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    params = replace(defaults, **given, stop=request.stop, logit_bias=request.logit_bias)
    if isinstance(request, ChatCompletionRequest):
        return replace(params, logprobs=(request.top_logprobs or 0) if request.logprobs else None)
    echoed = request.logprobs if request.echo else None
    if request.max_tokens == 0:  # the engine computes a prompt without an answer for its scores alone
        echoed = request.logprobs or 0
    return replace(params, logprobs=request.logprobs, prompt_logprobs=echoed)


def _check_biases(request: Sampling, limits: EngineLimits) -> None:
    for token in request.logit_bias:
        if token >= limits.vocabulary:
            raise invalid(f"logit_bias: token ids end at {limits.vocabulary - 1}, got {token}", "logit_bias")


def with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """The choice's own seed: the given one for the first, so that n does not change it; int64 wraps around."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)
