"""One request in OpenAI's completions protocol: its body, and its chunks read into events."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_code.module_interface.interface import STOP, EngineError, Event, SamplingParams, Token, UpstreamError

PLAIN = SamplingParams()
STANDARD = ("top_p", "frequency_penalty", "presence_penalty")
EXTENSIONS = ("top_k", "repetition_penalty", "min_tokens", "ignore_eos")  # of vLLM and our own service


def request_body(model: str, prompt_ids: Sequence[int], params: SamplingParams, max_tokens: int) -> dict[str, Any]:
    """The JSON for /completions; what has its default is left out, so that plain servers understand plain requests."""
    body: dict[str, Any] = {"model": model, "prompt": list(prompt_ids), "max_tokens": max_tokens, "stream": True}
    body |= {"temperature": params.temperature, "stream_options": {"include_usage": True}}
    names = (*STANDARD, *EXTENSIONS)
    body |= {name: getattr(params, name) for name in names if getattr(params, name) != getattr(PLAIN, name)}
    if params.seed is not None:
        body["seed"] = params.seed
    if params.stop:
        body["stop"] = list(params.stop)
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    wanted = [n for n in (params.logprobs, params.prompt_logprobs) if n is not None]
    if wanted:
        body["logprobs"] = max(wanted)
    if params.prompt_logprobs is not None:
        body["echo"] = True
    return body


class Answer:
    """Reads chunks; knows at the end how the answer ended."""

    def __init__(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        self.num_prompt_tokens, self.params = num_prompt_tokens, params
        self.num_tokens, self.num_cached_tokens = 0, 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._prompt: list[Token] = []
        self._echoes = num_prompt_tokens if params.prompt_logprobs is not None else 0  # prompt tokens to come

    def read(self, chunk: Mapping[str, Any]) -> Event | None:
        """The event of a chunk, None where it brings no text. Raises UpstreamError for an error chunk."""
        if error := chunk.get("error"):
            text = error.get("message", error) if isinstance(error, Mapping) else error
            raise UpstreamError(f"the upstream server broke off: {text}")
        if usage := chunk.get("usage"):
            self.num_tokens = usage.get("completion_tokens", self.num_tokens)
            details = usage.get("prompt_tokens_details") or {}
            self.num_cached_tokens = details.get("cached_tokens") or 0
        choices = chunk.get("choices") or [{}]
        return self._read_choice(choices[0])

    def _read_choice(self, choice: Mapping[str, Any]) -> Event | None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.stop_reason = choice.get("stop_reason", self.stop_reason)
        tokens = _tokens(choice)
        if self._echoes:
            self._prompt += tokens[: self._echoes]
            tokens, self._echoes = tokens[self._echoes :], max(self._echoes - len(tokens), 0)
        self.num_tokens += len(tokens)
        if not tokens:
            return None
        return self.event(tokens)

    def event(
        self, tokens: Sequence[Token] = (), finish_reason: str | None = None, error: EngineError | None = None
    ) -> Event:
        """An event with the counts so far."""
        prompt, self._prompt = (self._prompt, []) if not self._echoes else ([], self._prompt)
        return Event(
            text="".join(token.text for token in tokens),
            tokens=tuple(tokens),
            prompt_tokens=tuple(prompt),
            finish_reason=finish_reason,
            stop_reason=self.stop_reason if finish_reason == STOP else None,
            error=error,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_tokens=self.num_tokens,
        )

    def last(self) -> Event:
        """The event that ends the answer. Raises UpstreamError when the stream ended without saying why."""
        if self.finish_reason is None:
            raise UpstreamError("the upstream server closed the connection before the answer ended.")
        return self.event(finish_reason=self.finish_reason)


def _tokens(choice: Mapping[str, Any]) -> list[Token]:
    """The tokens of a chunk: one by one with their log-probabilities, else its whole text as one."""
    text, scores = choice.get("text") or "", choice.get("logprobs")
    ids = choice.get("token_ids") or []
    if not scores or not scores.get("tokens"):
        return [Token(ids[0] if len(ids) == 1 else -1, text)] if text else []
    count = len(scores["tokens"])
    ids = ids if len(ids) == count else [-1] * count
    top = scores.get("top_logprobs") or [None] * count
    rows = zip(ids, _pieces(text, scores), scores["token_logprobs"], top, strict=True)
    return [_token(token_id, piece, logprob, others or {}) for token_id, piece, logprob, others in rows]


def _pieces(text: str, scores: Mapping[str, Any]) -> list[str]:
    """Each token's part of the text. Tokens are named by their bytes, which need not join to it; the offsets tell."""
    count, offsets = len(scores["tokens"]), scores.get("text_offset") or []
    if len(offsets) == count and offsets == sorted(offsets):
        borders = [offset - offsets[0] for offset in offsets] + [len(text)]
        return [text[begin:end] for begin, end in zip(borders, borders[1:], strict=False)]
    return [""] * (count - 1) + [text]


def _token(token_id: int, text: str, logprob: float | None, alternatives: Mapping[str, float]) -> Token:
    likeliest = sorted(alternatives.items(), key=lambda item: -item[1])
    return Token(
        token_id, text, logprob, tuple((-1, score) for _, score in likeliest), tuple(name for name, _ in likeliest)
    )
