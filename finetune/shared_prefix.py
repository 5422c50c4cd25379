"""Tokens that all prompts begin with, computed once: their cache is copied for every batch.

Worked examples before a question, or an instruction before every row, are then paid for once and not for every row.
"""

import copy
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import torch

MIN_TOKENS = 16  # below this the copies cost more than the computation


def num_shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens at the beginning are the same in all prompts, at least one less than the shortest has.

    0 when they are too few to be worth a cache, or there is one prompt alone.
    """
    if len(prompts) < 2:
        return 0
    # the smallest and the largest differ earliest
    shared = len(commonprefix([list(min(prompts)), list(max(prompts))]))
    shared = min(shared, min(map(len, prompts)) - 1)
    return shared if shared >= MIN_TOKENS else 0


class SharedPrefix:
    """The cache of the first `num_tokens` tokens of some prompts; empty for 0."""

    def __init__(self, model: Any, token_ids: Sequence[int]) -> None:
        self.num_tokens, self.cache = len(token_ids), None
        if token_ids:
            with torch.inference_mode():
                input_ids_1T = torch.tensor([list(token_ids)], device=model.device)
                self.cache = model(input_ids=input_ids_1T, use_cache=True, logits_to_keep=1).past_key_values

    def copies(self, num_rows: int) -> Any:
        """A cache for a batch of `num_rows` prompts, or None where nothing is shared."""
        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_rows)
        return cache


NOTHING_SHARED = SharedPrefix(None, [])
