"""What every engine does alike: chat format, token texts, and answers on top of `submit`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from finetune.conversation import encode_prompt
from llm_code.module_interface.interface import Completion, EngineLimits, Event, Message, SamplingParams, messages_of
from llm_code.module_interface.requests import LiveRequest
from llm_code.module_interface.tokens import TokenTexts


class EngineBase(ABC):
    """Half of interface.Engine: a subclass adds submit, limits, stats and close."""

    limits: EngineLimits
    weights_fingerprint: str | None = None

    def __init__(self, tokenizer: Any, model_name: str, defaults: SamplingParams) -> None:
        self.tokenizer, self.model_name, self.defaults = tokenizer, model_name, defaults
        self.texts = TokenTexts(tokenizer)

    @abstractmethod
    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[Event], None] | None = None
    ) -> LiveRequest:
        """See interface.Engine."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """See interface.Engine."""
        return encode_prompt(self.tokenizer, [dict(message) for message in messages])

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of plain text, control tokens in it as text."""
        return self.tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]

    def token_text(self, token_id: int) -> str:
        """See interface.Engine."""
        return self.texts.text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, also where they are part of a character."""
        return self.texts.bytes(token_id)

    def _ask(self, messages: Sequence[Message], params: SamplingParams | None) -> LiveRequest:
        prompt_ids = self.encode_chat(messages)
        if params is None:  # the recommended length is a limit, no reason to refuse a long conversation
            room = max(self.limits.context - len(prompt_ids), 1)
            params = replace(self.defaults, max_tokens=min(self.defaults.max_tokens or room, room))
        return self.submit(prompt_ids, params)

    def generate(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """The whole answer to a conversation; without `params` as the checkpoint recommends."""
        return self._ask(messages, params).result()

    def stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Event]:
        """See interface.Engine."""
        request = self._ask(messages, params)
        try:
            yield from request
        finally:
            request.cancel()

    def predict(self, query: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The answer to one question after earlier (question, answer) pairs."""
        return self.generate(messages_of(query, history)).text


def recommended_params(config: Any) -> SamplingParams:
    """What a checkpoint's generation config recommends; greedy where it does not sample."""
    common = {"repetition_penalty": config.repetition_penalty or 1.0, "max_tokens": config.max_new_tokens}
    if not config.do_sample:
        return SamplingParams(temperature=0.0, **common)
    temperature = 1.0 if config.temperature is None else config.temperature
    return SamplingParams(temperature=temperature, top_p=config.top_p or 1.0, top_k=config.top_k or 0, **common)
