"""One request inside the local engine: what is known on the host about its tokens, its place and its text."""

from collections.abc import Sequence as TokenIds
from typing import Any

from llm_code.module_interface.cache import Extent
from llm_code.module_interface.interface import LENGTH, STOP, EngineError, Event, SamplingParams, Token
from llm_code.module_interface.requests import LiveRequest
from llm_code.module_interface.stop_strings import TextStream


class Sequence:
    """The engine's side of a request. Only the engine's thread touches it, except for `cancelled`."""

    def __init__(
        self, prompt: TokenIds[int], params: SamplingParams, max_tokens: int, request: LiveRequest, tokenizer: Any
    ) -> None:
        self.prompt, self.params, self.max_tokens, self.request = list(prompt), params, max_tokens, request
        self.context = self.prompt  # computed before the next token is chosen: the answer so far too, once set back
        self.seed = 0
        self.tokens: list[int] = []  # of the answer, known on the host
        self.text = TextStream(tokenizer, params.stop, params.min_tokens)
        self.slot: int | None = None
        self.extent: Extent | None = None
        self.num_in_cache = 0  # tokens whose keys and values are computed, or will be by steps under way
        self.num_chosen = 0  # tokens of the answer, those of steps under way included
        self.num_cached_tokens = 0
        self.times_set_back = 0
        self.prompt_tokens: list[Token] = []
        self.cancelled = False
        self.finish_reason: str | None = None
        self.end_token: Token | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_prefilling(self) -> bool:
        return self.num_in_cache < len(self.context)

    @property
    def num_left(self) -> int:
        """Tokens that may still be chosen."""
        return self.max_tokens - self.num_chosen

    @property
    def wants_token(self) -> bool:
        """Whether another step can bring a token, as far as is known before the running steps end."""
        return not self.finished and not self.is_prefilling and self.num_chosen < self.max_tokens

    def known_tokens(self) -> list[int]:
        """Tokens whose keys and values lie in the cache and are known by name: all but the last chosen one."""
        return (self.prompt + self.tokens)[: self.num_in_cache][: len(self.prompt) + max(len(self.tokens) - 1, 0)]

    def set_back(self) -> None:
        """Lose the place in the cache: what was said so far is computed again later, then the answer goes on.

        Tokens chosen by steps still under way are chosen again (see `times_set_back`), the same ones.
        """
        self.context = self.prompt + self.tokens
        self.num_in_cache, self.num_chosen = 0, len(self.tokens)
        self.slot = self.extent = None
        self.times_set_back += 1

    def accept(self, token: Token, end_ids: frozenset[int]) -> None:
        """Take the next token of the answer, deliver the text that became certain, and finish where it ends."""
        self.tokens.append(token.id)
        if token.id in end_ids and not self.params.ignore_eos:
            self.end_token = token
            self.finish(STOP, token.id)
            return
        released = self.text.add(token)
        if self.text.stopped_by is not None:
            self.deliver(released, STOP, self.text.stopped_by)
        elif len(self.tokens) >= self.max_tokens:
            self.finish(LENGTH, None, released)
        elif released:
            self.deliver(released)

    def finish(self, reason: str, stop_reason: str | int | None = None, released: TokenIds[Token] = ()) -> None:
        """End the answer with the text still held back."""
        rest = [*released, *self.text.finish()]
        if self.text.stopped_by is not None:
            reason, stop_reason = STOP, self.text.stopped_by
        self.deliver(rest, reason, stop_reason)

    def deliver(
        self,
        tokens: TokenIds[Token] = (),
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
        error: EngineError | None = None,
    ) -> None:
        """Send an event; one with a finish_reason is the last."""
        self.finish_reason = finish_reason
        event = Event(
            text="".join(token.text for token in tokens),
            tokens=tuple(tokens),
            prompt_tokens=tuple(self.prompt_tokens),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            end_token=self.end_token,
            error=error,
            num_prompt_tokens=len(self.prompt),
            num_cached_tokens=self.num_cached_tokens,
            num_tokens=len(self.tokens),
        )
        self.prompt_tokens = []
        self.request.push(event)
