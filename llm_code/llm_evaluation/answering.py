"""Three ways to have prompts answered behind one shape: greedy or sampled text, the likeliest label, a service.

An answerer plans batches of prompt numbers and answers them; the plan depends on nothing but the prompts and its
settings, so that a run which was killed goes on with the same batches and ends with the same bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, Protocol

from finetune.models import check_model_dir, default_dtype, load_for_inference, load_tokenizer
from finetune.partial_results import config_hash

Batch = Sequence[int]
Answers = list[tuple[int, str]]  # (number of the prompt, answer)


@dataclass(frozen=True)
class Prompt:
    """A user message, and the part of it that it has in common with others."""

    text: str
    opening: str = ""


@dataclass(frozen=True)
class Decoding:
    """How text is generated; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Answerer(Protocol):
    """Anything that answers prompts."""

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Everything that decides the answers: equal identities give equal answers."""
        ...

    def plan(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Batches of prompt numbers, each number once."""
        ...

    def answer(self, prompts: Sequence[Prompt], batches: Sequence[Batch]) -> Iterator[Answers]:
        """The answers of one batch after the other, in any order. Raises UserError where the person can help."""
        ...


@dataclass
class LocalModel:
    """A checkpoint on this machine, perhaps with an adapter; loaded when the first answer is wanted."""

    model_name_or_path: str
    adapter_name_or_path: str | None = None
    load_in_4bit: bool = False
    token_budget: int = 0  # tokens of one batch, 0: by the device
    batch_size: int = 256  # rows of one batch at most
    encoded: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError unless the checkpoint, and an adapter that belongs to it, are there."""
        from finetune.identity import check_adapter

        check_model_dir(self.model_name_or_path)
        if self.adapter_name_or_path:
            check_adapter(self.adapter_name_or_path, self.model_name_or_path)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return load_tokenizer(self.model_name_or_path)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        return load_for_inference(
            self.model_name_or_path, self.adapter_name_or_path, self.load_in_4bit, default_dtype()
        )

    @cached_property
    def budget(self) -> int:
        """Tokens of one batch."""
        import torch

        from finetune.generate import default_token_budget

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return self.token_budget or default_token_budget(device)

    def ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt as the only user message of a chat."""
        from finetune.conversation import encode_prompts

        new = [text for text in dict.fromkeys(prompt.text for prompt in prompts) if text not in self.encoded]
        conversations = [[{"role": "user", "content": text}] for text in new]
        self.encoded |= zip(new, encode_prompts(self.tokenizer, conversations), strict=True)
        return [self.encoded[prompt.text] for prompt in prompts]

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Weights, numbers' format, device, batches and prompts as tokens."""
        import torch

        from finetune.identity import adapter_fingerprint, fingerprint

        adapter = self.adapter_name_or_path
        return {
            "model": fingerprint(self.model_name_or_path),
            "adapter": adapter_fingerprint(adapter) if adapter else None,
            "load_in_4bit": self.load_in_4bit,
            "dtype": default_dtype(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
            "token_budget": self.budget,
            "batch_size": self.batch_size,
            "prompts": config_hash({"token_ids": self.ids(prompts)}),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }


def groups_of(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Numbers of prompts with the same opening, in their order."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.opening, []).append(number)
    return list(groups.values())


def plan_groups(prompts: Sequence[Prompt], costs: Sequence[int], model: LocalModel) -> list[list[int]]:
    """Batches that never mix openings, in each group the costliest first."""
    from finetune.generate import plan_batches

    batches = []
    for numbers in groups_of(prompts):
        planned = plan_batches([costs[number] for number in numbers], model.budget, model.batch_size)
        batches += [[numbers[i] for i in batch] for batch in planned]
    return batches


def with_shared_tokens(
    prompts: Sequence[Prompt], batches: Sequence[Batch], ids: Sequence[list[int]]
) -> Iterator[tuple]:
    """(consecutive batches of one opening, number of tokens that all prompts with this opening begin with)."""
    from finetune.shared_prefix import num_shared_tokens

    shared = {
        prompts[numbers[0]].opening: num_shared_tokens([ids[number] for number in numbers])
        for numbers in groups_of(prompts)
    }
    for opening, group in groupby(batches, key=lambda batch: prompts[batch[0]].opening):
        yield list(group), shared[opening]


@dataclass
class Generation:
    """Text, decoded on this machine."""

    model: LocalModel
    decoding: Decoding

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {"answer": "generate"} | vars(self.decoding) | self.model.identity(prompts)

    def plan(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        costs = [len(ids) + self.decoding.max_new_tokens for ids in self.model.ids(prompts)]
        return plan_groups(prompts, costs, self.model)

    def answer(self, prompts: Sequence[Prompt], batches: Sequence[Batch]) -> Iterator[Answers]:
        from finetune.generate import Sampling, generate_batches

        sampling = Sampling(temperature=self.decoding.temperature, top_p=self.decoding.top_p)
        ids = self.model.ids(prompts)
        for group, num_shared in with_shared_tokens(prompts, batches, ids):
            yield from generate_batches(
                *self.model.loaded, ids, group, self.decoding.max_new_tokens, sampling, self.decoding.seed, num_shared
            )


@dataclass
class Likelihood:
    """The likeliest of some labels, each closed by the model's end token."""

    model: LocalModel
    labels: Sequence[str]

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {"answer": "likelihood", "labels": list(self.labels)} | self.model.identity(prompts)

    def plan(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        label_tokens = max(len(self.model.tokenizer.encode(label, add_special_tokens=False)) for label in self.labels)
        costs = [len(self.labels) * (len(ids) + label_tokens + 1) for ids in self.model.ids(prompts)]
        return plan_groups(prompts, costs, self.model)

    def answer(self, prompts: Sequence[Prompt], batches: Sequence[Batch]) -> Iterator[Answers]:
        from finetune.label_scores import candidate_ids, end_of_answer_id, score_batches

        model, tokenizer = self.model.loaded
        end_id = end_of_answer_id(model, tokenizer)
        candidates = [candidate_ids(tokenizer, label, end_id) for label in self.labels]
        ids = self.model.ids(prompts)
        cases = [(prompt_ids, candidates) for prompt_ids in ids]
        for group, num_shared in with_shared_tokens(prompts, batches, ids):
            for pairs in score_batches(model, tokenizer, cases, group, num_shared):
                yield [(number, self.labels[scores.index(max(scores))]) for number, scores in pairs]
