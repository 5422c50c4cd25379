"""Tokens shared by all prompts are computed once: the answers and scores must be those of computing them every time."""

import random

import pytest
import torch

from finetune.generate import generate_batches, plan_batches
from finetune.label_scores import candidate_ids, score_batches
from finetune.models import load_for_inference
from finetune.shared_prefix import MIN_TOKENS, num_shared_tokens

NEW_TOKENS = 10


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_baichuan"])
def loaded(request):
    """Either tiny model with larger weights, so that its greedy answers differ from prompt to prompt."""
    model, tokenizer = load_for_inference(request.getfixturevalue(request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model, tokenizer


@pytest.fixture(scope="module")
def prompts(loaded):
    """Twelve random endings of 1 to 30 tokens behind the same 40."""
    rng, top = random.Random(3), min(len(loaded[1]), 2000) - 300
    start = [rng.randrange(top) for _ in range(40)]
    return [start + [rng.randrange(top) for _ in range(rng.randint(1, 30))] for _ in range(12)]


def test_shared_tokens_are_counted():
    start = list(range(MIN_TOKENS))
    assert num_shared_tokens([[*start, 1, 2], [*start, 1, 3], [*start, 1]]) == MIN_TOKENS
    assert num_shared_tokens([[*start, 7, 7], [*start, 8]]) == MIN_TOKENS
    assert num_shared_tokens([[*start], [*start]]) == 0  # a token must be left to each
    assert num_shared_tokens([[1, *start], [2, *start]]) == 0
    assert num_shared_tokens([[*start, 1]]) == 0 == num_shared_tokens([])


@pytest.mark.parametrize("max_rows", [1, 5])
def test_generation(loaded, prompts, max_rows):
    batches = plan_batches([len(prompt) for prompt in prompts], 100_000, max_rows)
    found = [
        dict(
            pair
            for pairs in generate_batches(*loaded, prompts, batches, NEW_TOKENS, num_shared=count)
            for pair in pairs
        )
        for count in (0, 40)
    ]
    assert found[0] == found[1] and len(set(found[0].values())) > 6


def test_label_scores(loaded, prompts):
    model, tokenizer = loaded
    cases = [(prompt, [candidate_ids(tokenizer, text, 5) for text in ("是", "不是的", "AB")]) for prompt in prompts]
    batches = [list(range(7)), list(range(7, 12))]
    plain, shared = (
        dict(pair for pairs in score_batches(model, tokenizer, cases, batches, count) for pair in pairs)
        for count in (0, 40)
    )
    for index in plain:
        assert shared[index] == pytest.approx(plain[index], abs=1e-3, rel=1e-5)
    assert len({round(scores[0], 2) for scores in plain.values()}) > 4, "the prompts should matter"
