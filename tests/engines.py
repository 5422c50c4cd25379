"""Small engines for tests: random float32 models of 97 tokens, and tokenizers simple enough to foresee their text."""

from collections.abc import Sequence
from typing import Any

import torch

from llm_code.module_interface.interface import SamplingParams
from llm_code.module_interface.local_engine import LocalEngine, LocalOptions
from tests.tiny.native import VOCABULARY, tiny_native

CONTEXT = 256


class Letters:
    """One character for each id."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(33 + i) for i in ids)


class Bytes:
    """Ids are bytes of UTF-8."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")


def model(family: str = "qwen2", **changes: Any) -> Any:
    return tiny_native(family, max_position_embeddings=CONTEXT, **changes)


def engine(family: str = "qwen2", lm: Any = None, tokenizer: Any = None, on_death=lambda error: None, **options):
    """A local engine over a tiny model."""
    chosen = LocalOptions(**{"max_batch": 4, "prefill_tokens": 16} | options)
    return LocalEngine(lm or model(family), tokenizer or Letters(), "tiny", chosen, on_death)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedy(max_tokens: int = 12, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **others)


def answer(lm: Any, prompt: list[int], max_tokens: int = 12) -> list[int]:
    """model.generate's greedy tokens."""
    ids = torch.tensor([prompt])
    output = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def token_ids(completion: Any) -> list[int]:
    return [token.id for token in completion.tokens]
