"""Prompts answered by the engine that also stands behind demo, service and page."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm_code.llm_evaluation.answering import Answers, Batch, Decoding, LocalModel, Prompt, groups_of
from llm_code.module_interface.interface import Engine, SamplingParams

WAITING = 256  # requests handed over ahead of the oldest that runs


@dataclass
class EngineAnswers:
    """Continuous batches: the engine chooses them, and keeps the beginnings that prompts share."""

    model: LocalModel
    decoding: Decoding

    @cached_property
    def engine(self) -> Engine:
        """The engine in this process."""
        from llm_code.module_interface.load import EngineSettings, load_engine

        model = self.model
        return load_engine(
            EngineSettings(
                model.model_name_or_path,
                adapter_name_or_path=model.adapter_name_or_path,
                load_in_4bit=model.load_in_4bit,
                max_queue=WAITING,
            )
        )

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {"answer": "engine"} | vars(self.decoding) | self.model.identity(prompts)

    def plan(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """One prompt a request, those with the same opening behind one another."""
        return [[number] for group in groups_of(prompts) for number in group]

    def answer(self, prompts: Sequence[Prompt], batches: Sequence[Batch]) -> Iterator[Answers]:
        ids, running = self.model.ids(prompts), deque()
        try:
            for number in (number for batch in batches for number in batch):
                running.append((number, self.engine.submit(ids[number], self.params(number))))
                if len(running) == WAITING:
                    yield [_finished(*running.popleft())]
            while running:
                yield [_finished(*running.popleft())]
        finally:
            self.engine.close()
            del self.engine

    def params(self, number: int) -> SamplingParams:
        """Greedy, or with a seed of its own for every prompt."""
        decoding = self.decoding
        return SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed + number,
        )


def _finished(number: int, request: Any) -> tuple[int, str]:
    return number, request.result().text
