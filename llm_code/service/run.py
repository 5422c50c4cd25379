"""One request's way through the engine: admission, prompt ids, the room in the context, events, figures, release."""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from llm_code.module_interface.interface import ContextTooLong, Engine, Event, SamplingParams
from llm_code.service.admission import Admission
from llm_code.service.answers import Answers, Job
from llm_code.service.errors import invalid
from llm_code.service.metrics import Metrics
from llm_code.service.protocol import Sampling
from llm_code.service.replies import CachedTokens, Usage
from llm_code.service.sampling import with_seed
from llm_code.service.settings import ServiceSettings

CHARACTERS_PER_TOKEN = 8  # more than any text has on average; a guess that only decides how much is read at first


class Host(Protocol):
    """What a run needs of the service."""

    engine: Engine
    settings: ServiceSettings
    metrics: Metrics
    admission: Admission
    open_answers: set[Answers]
    encoder: Executor


def system_fingerprint(engine: Engine) -> str:
    """Another one for other weights, where the engine knows them."""
    text = engine.weights_fingerprint or engine.model_name
    return f"fp_{uuid.uuid5(uuid.NAMESPACE_URL, text).hex[:10]}"


class Run(ABC):
    """What chat and text completion have in common. Its events may be read once.

    `key` says whose request it is. Raises ApiError, or the engine's errors, while its events are read.
    """

    prefix, prompt_field = "cmpl", "prompt"

    def __init__(self, host: Host, request: Sampling, params: SamplingParams, model: str, key: str) -> None:
        self.host, self.engine, self.metrics = host, host.engine, host.metrics
        self.request, self.params, self.key = request, params, key
        self.choices_per_prompt = request.n or 1
        self.envelope: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": system_fingerprint(self.engine),
        }
        self.prompts: list[list[int]] = []
        self.last_events: dict[int, Event] = {}

    def num_answers(self) -> int:
        return self.choices_per_prompt

    def number_field(self) -> str:
        """The field that decides how many answers there are."""
        return "n"

    @abstractmethod
    def encode_prompts(self) -> list[list[int]]:
        """Ids of every prompt."""

    @abstractmethod
    def max_tokens(self) -> int | None:
        """The request's limit, None where it names none."""

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) of all choices, in the order in which they come."""
        started, silent = time.monotonic(), True
        answers = await self._start()
        try:
            async with aclosing(answers.events()) as events:
                async for index, event in events:
                    if event.text and silent:
                        self.metrics.first_token.observe(time.monotonic() - started)
                        silent = False
                    if event.finish_reason is not None:
                        self.last_events[index] = event
                    yield index, event
        except (asyncio.CancelledError, GeneratorExit):  # the client left
            self.metrics.cancelled.add(answers.close())
            raise
        finally:
            answers.close()
            self.host.open_answers.discard(answers)
        self.metrics.prompt_tokens.add(sum(map(len, self.prompts)))
        self.metrics.answer_tokens.add(sum(event.num_tokens for event in self.last_events.values()))

    async def _start(self) -> Answers:
        count = self.num_answers()
        self.host.admission.take(self.key, count, self.number_field())
        release = partial(self.host.admission.release, self.key)
        try:
            jobs = await asyncio.get_running_loop().run_in_executor(self.host.encoder, self._jobs)
        except BaseException:
            release(count)
            raise
        answers = Answers(self.engine, jobs, self.host.settings.request_seconds, release)
        answers.start()
        self.host.open_answers.add(answers)
        return answers

    def _jobs(self) -> list[Job]:
        self.prompts = self.encode_prompts()
        jobs = []
        for prompt_ids in self.prompts:
            params = replace(self.params, max_tokens=self._room(len(prompt_ids)))
            jobs += [(prompt_ids, with_seed(params, choice)) for choice in range(self.choices_per_prompt)]
        return jobs

    def _room(self, num_prompt_tokens: int) -> int:
        """Tokens the answer may have: what was asked for or, where nothing was, what is left, within a limit."""
        wanted, context = self.max_tokens(), self.engine.limits.context
        room = context - num_prompt_tokens
        if room < (1 if wanted is None else wanted):
            raise ContextTooLong(num_prompt_tokens, wanted or 1, context, self.prompt_field)
        return wanted if wanted is not None else min(room, self.host.settings.default_max_tokens)

    def refuse_overlong(self, text: str) -> None:
        """Raise ApiError for a text that cannot fit, having encoded no more of it than shows that."""
        context, size = self.engine.limits.context, self.engine.limits.context * CHARACTERS_PER_TOKEN
        while size < len(text):
            num_tokens = len(self.engine.encode_text(text[:size], add_special_tokens=False))
            if num_tokens > context:
                message = f"this model's context is {context} tokens, but the prompt alone has over {num_tokens}"
                raise invalid(message, self.prompt_field, "context_length_exceeded")
            size *= 4

    def usage(self) -> Usage:
        """Prompt tokens count once for all choices of a prompt, answer tokens for each choice."""
        prompt = sum(map(len, self.prompts))
        answer = sum(event.num_tokens for event in self.last_events.values())
        firsts = [event for index, event in self.last_events.items() if index % self.choices_per_prompt == 0]
        cached = sum(event.num_cached_tokens for event in firsts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=answer,
            total_tokens=prompt + answer,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    def wants_usage(self) -> bool:
        return bool(self.request.stream_options and self.request.stream_options.include_usage)

    def usage_null(self) -> dict[str, None]:
        """Chunks say `usage: null` where a last chunk will have it, and nothing where none was asked for."""
        return {"usage": None} if self.wants_usage() else {}
