"""Log-likelihoods of candidate answers: the prompt is computed once, its cache is shared by all its candidates.

Shapes: B prompts, N candidates of all prompts of a batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finetune.generate import (
    MAX_ROWS,
    OutOfMemoryGuard,
    causal_model,
    default_token_budget,
    left_pad,
    pad_token_id,
    plan_batches,
    stop_token_ids,
)
from finetune.shared_prefix import NOTHING_SHARED, SharedPrefix

Case = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt's ids and the ids of each candidate


def end_of_answer_id(model: Any, tokenizer: Any) -> int:
    """The token a trained model closes an answer with: the first end token its chat template writes behind one.

    A template that writes none (Baichuan2's) leaves it to the tokenizer's own end token, which its training labels use.
    """
    mark = "\u7b54"  # any one character that no template contains: 答
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rsplit(mark, 1)[-1]
    stop_ids = stop_token_ids(model, tokenizer)
    tail_ids = tokenizer.encode(tail, add_special_tokens=False)
    return next((token for token in tail_ids if token in stop_ids), tokenizer.eos_token_id)


def candidate_ids(tokenizer: Any, text: str, end_id: int) -> list[int]:
    """Token ids of an answer and its end token."""
    return [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], end_id]


def _token_scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of `targets` (...) under `logits` (..., V), in fp32."""
    logits = logits.float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


@torch.inference_mode()
def score_batch(
    model: Any, cases: Sequence[Case], pad_id: int, shared: SharedPrefix = NOTHING_SHARED
) -> list[list[float]]:
    """Sum of log p over each candidate's tokens behind its prompt; one list for each case."""
    lm = causal_model(model)
    prompt_BT, mask_BT = left_pad([prompt for prompt, _ in cases], pad_id, lm.device, shared.num_tokens)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    first = lm(
        input_ids=prompt_BT[:, shared.num_tokens :],
        attention_mask=mask_BT,
        position_ids=positions_BT[:, shared.num_tokens :],
        past_key_values=shared.copies(len(cases)),
        use_cache=True,
        logits_to_keep=1,
    )
    owners = [b for b, (_, candidates) in enumerate(cases) for _ in candidates]
    flat = [list(candidate) for _, candidates in cases for candidate in candidates]
    longest = max(map(len, flat))
    targets_NT = torch.tensor([c + [pad_id] * (longest - len(c)) for c in flat], device=lm.device)
    used_NT = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in flat], device=lm.device)
    owner_N = torch.tensor(owners, device=lm.device)
    scores_NT = _token_scores(first.logits[owner_N, -1:], targets_NT[:, :1])
    if longest > 1:
        first.past_key_values.batch_select_indices(owner_N)
        steps = torch.arange(1, longest, device=lm.device)
        rest = lm(
            input_ids=targets_NT[:, :-1],
            attention_mask=torch.cat([mask_BT[owner_N], used_NT[:, :-1]], dim=1),
            position_ids=positions_BT[owner_N, -1:] + steps,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        scores_NT = torch.cat([scores_NT, _token_scores(rest.logits, targets_NT[:, 1:])], dim=1)
    totals = iter((scores_NT * used_NT).sum(-1).tolist())
    return [[next(totals) for _ in candidates] for _, candidates in cases]


def plan_cases(cases: Sequence[Case], token_budget: int, max_rows: int = MAX_ROWS) -> list[list[int]]:
    """Batches of case indices; a case costs its prompt once for every candidate (the cache is copied for each)."""
    costs = [len(candidates) * (len(prompt) + max(map(len, candidates))) for prompt, candidates in cases]
    return plan_batches(costs, token_budget, max_rows)


def score_batches(
    model: Any, tokenizer: Any, cases: Sequence[Case], batches: Sequence[Sequence[int]], num_shared: int = 0
) -> Iterator[list[tuple[int, list[float]]]]:
    """(index, scores) pairs, one list for each of `batches`.

    The first `num_shared` tokens, the same in all prompts of these batches, are computed once.
    Raises UserError when one case does not fit the card.
    """
    if not batches:
        return
    pad_id, guard = pad_token_id(tokenizer, stop_token_ids(model, tokenizer)), OutOfMemoryGuard()
    shared = SharedPrefix(causal_model(model), cases[batches[0][0]][0][:num_shared])
    for batch in batches:
        scores = guard.run(lambda part: score_batch(model, [cases[i] for i in part], pad_id, shared), list(batch))
        yield list(zip(batch, scores, strict=True))


def label_log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[str]],
    token_budget: int | None = None,
    max_rows: int = MAX_ROWS,
) -> list[list[float]]:
    """log p(candidate, end of answer | prompt) for every candidate text of every prompt (lists of token ids)."""
    end_id = end_of_answer_id(model, tokenizer)
    cases = [
        (prompt, [candidate_ids(tokenizer, text, end_id) for text in texts])
        for prompt, texts in zip(prompts, candidates, strict=True)
    ]
    budget = token_budget or default_token_budget(causal_model(model).device)
    results: list[list[float]] = [[] for _ in cases]
    for pairs in score_batches(model, tokenizer, cases, plan_cases(cases, budget, max_rows)):
        for index, scores in pairs:
            results[index] = scores
    return results
