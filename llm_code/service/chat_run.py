"""A chat completion: from the engine's events to one reply or to chunks."""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from llm_code.module_interface.interface import Token
from llm_code.service.logprobs import chat_logprobs
from llm_code.service.protocol import ChatCompletionRequest
from llm_code.service.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
)
from llm_code.service.run import Run


class ChatRun(Run):
    request: ChatCompletionRequest
    prefix, prompt_field = "chatcmpl", "messages"

    def encode_prompts(self) -> list[list[int]]:
        messages = self.request.plain_messages()
        self.refuse_overlong("\n".join(message["content"] for message in messages))
        return [self.engine.encode_chat(messages)]

    def max_tokens(self) -> int | None:
        return self.request.answer_tokens()

    async def reply(self) -> ChatCompletion:
        """The whole answer."""
        texts: dict[int, str] = defaultdict(str)
        tokens: dict[int, list[Token]] = defaultdict(list)
        async with aclosing(self.events()) as events:
            async for index, event in events:
                texts[index] += event.text
                tokens[index] += event.tokens
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=texts[index]),
                logprobs=self._logprobs(tokens[index]),
                finish_reason=self.last_events[index].finish_reason,
            )
            for index in sorted(self.last_events)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=self.usage(), **self.envelope)

    async def chunks(self) -> AsyncIterator[ChatCompletionChunk]:
        """The answer in pieces: for each choice a role, texts and one finish_reason; then the usage, if asked for."""
        begun: set[int] = set()
        held: dict[int, list[Token]] = defaultdict(list)  # tokens without a text of their own wait for the next one
        async with aclosing(self.events()) as events:
            async for index, event in events:
                if index not in begun:
                    begun.add(index)
                    yield self._chunk(index, Delta(role="assistant", content=""))
                held[index] += event.tokens
                if event.text:
                    yield self._chunk(index, Delta(content=event.text), held.pop(index))
                if event.finish_reason is not None:
                    yield self._chunk(index, Delta(), held.pop(index, ()), event.finish_reason)
        if self.wants_usage():
            yield ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=self.usage(), **self.envelope)

    def _chunk(
        self, index: int, delta: Delta, tokens: Sequence[Token] = (), finish_reason: str | None = None
    ) -> ChatCompletionChunk:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatCompletionChunk(
            object="chat.completion.chunk", choices=[choice], **self.usage_null(), **self.envelope
        )

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        return chat_logprobs(self.engine, tokens) if self.request.logprobs else None
