"""A text completion, of one prompt or many, as text or as token ids; with `echo` the prompt comes back in front.

The log-probabilities have the end token too, with an empty text: programs that score a prompt with max_tokens 1, as
lm-eval does, take away one place at the end whatever it is.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from llm_code.module_interface.interface import Event, InvalidRequest, Token
from llm_code.service.logprobs import text_logprobs
from llm_code.service.protocol import CompletionRequest
from llm_code.service.replies import Completion, TextChoice
from llm_code.service.run import Run


class CompletionRun(Run):
    request: CompletionRequest

    def num_answers(self) -> int:
        return len(self.request.prompt) * self.choices_per_prompt

    def number_field(self) -> str:
        return "prompt" if len(self.request.prompt) > 1 else "n"

    def encode_prompts(self) -> list[list[int]]:
        return [self._encode(prompt) for prompt in self.request.prompt]

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self.refuse_overlong(prompt)
            prompt_ids = self.engine.encode_text(prompt)
            if not prompt_ids:
                raise InvalidRequest("expected a prompt of at least one token", "prompt")
            return prompt_ids
        vocabulary = self.engine.limits.vocabulary
        if max(prompt) >= vocabulary:
            raise InvalidRequest(f"token ids end at {vocabulary - 1}, got {max(prompt)}", "prompt")
        return prompt

    def max_tokens(self) -> int | None:
        return self.request.max_tokens

    async def reply(self) -> Completion:
        """The whole answers, those to the first prompt first."""
        texts: dict[int, str] = defaultdict(str)
        tokens: dict[int, list[Token]] = defaultdict(list)
        async with aclosing(self.events()) as events:
            async for index, event in events:
                if index not in texts:
                    texts[index] = self._echoed(index)
                texts[index] += event.text
                tokens[index] += _scored(event)
        choices = [self._choice(index, texts[index], tokens[index], 0) for index in sorted(self.last_events)]
        return Completion(object="text_completion", choices=choices, usage=self.usage(), **self.envelope)

    async def chunks(self) -> AsyncIterator[Completion]:
        """The answers in pieces; the last piece of each has its finish_reason."""
        lengths: dict[int, int] = {}
        held: dict[int, list[Token]] = defaultdict(list)
        async with aclosing(self.events()) as events:
            async for index, event in events:
                text = event.text if index in lengths else self._echoed(index) + event.text
                held[index] += _scored(event)
                if text or event.finish_reason is not None:
                    offset = lengths.get(index, 0)
                    lengths[index] = offset + len(text)
                    yield self._chunk(self._choice(index, text, held.pop(index), offset, event))
        if self.wants_usage():
            yield Completion(object="text_completion", choices=[], usage=self.usage(), **self.envelope)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], offset: int, event: Event | None = None
    ) -> TextChoice:
        wanted = self.request.logprobs is not None
        logprobs = text_logprobs(self.engine, tokens, offset) if wanted else None
        reason = (event or self.last_events[index]).finish_reason
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)

    def _chunk(self, choice: TextChoice) -> Completion:
        return Completion(object="text_completion", choices=[choice], **self.usage_null(), **self.envelope)

    def _echoed(self, index: int) -> str:
        """The prompt's text, given or put together from its tokens."""
        if not self.request.echo:
            return ""
        prompt = self.request.prompt[index // self.choices_per_prompt]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self.engine.token_bytes, prompt)).decode("utf-8", "replace")


def _scored(event: Event) -> tuple[Token, ...]:
    """The tokens of an event that have a place in the log-probabilities."""
    return (*event.prompt_tokens, *event.tokens, *((event.end_token,) if event.end_token else ()))
