"""What a running request is to the device: one row of small tensors, so that a step needs nothing from the host.

S slots (requests computed at the same time), V vocabulary. One more row, the last, stands for the empty rows of a
CUDA graph: it writes to the cache's scratch block.
"""

from collections.abc import Sequence

import torch

from llm_code.module_interface.interface import SamplingParams

MASK = (1 << 64) - 1
LEAST_TEMPERATURE = 1e-6


def mix(number: int) -> int:
    """A 64-bit number from a seed such that neighbouring seeds share nothing (the finaliser of splitmix64), signed."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    number ^= number >> 31
    return number - (1 << 64) if number >> 63 else number


class Slots:
    """Device state of all slots; assigning a Python number to a row is a fill that needs no synchronisation."""

    def __init__(self, num_slots: int, vocabulary: int, scratch: int, device: torch.device) -> None:
        def rows(dtype: torch.dtype, value: float = 0) -> torch.Tensor:
            return torch.full((num_slots + 1,), value, dtype=dtype, device=device)

        self.num_slots, self.vocabulary, self.device = num_slots, vocabulary, device
        self.last_token, self.length = rows(torch.int64), rows(torch.int64)  # length: tokens in the cache
        self.start = rows(torch.int64, scratch)
        self.generated, self.min_tokens = rows(torch.int64), rows(torch.int64)
        self.seed, self.top_k = rows(torch.int64), rows(torch.int64)
        self.temperature, self.top_p = rows(torch.float32, 1), rows(torch.float32, 1)
        self.repetition = rows(torch.float32, 1)
        self.frequency, self.presence = rows(torch.float32), rows(torch.float32)
        self.penalised, self.biased = rows(torch.bool), rows(torch.bool)  # whether the matrices below speak of it
        # (S + 1, V), made when a request first needs them
        self.counts: torch.Tensor | None = None  # occurrences in the answer
        self.in_prompt: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def join(
        self, slot: int, start: int, prompt: list[int], params: SamplingParams, seed: int, said: Sequence[int] = ()
    ) -> None:
        """Set a slot up for a request whose tokens lie from `start` on; `said` is its answer so far."""
        self.start[slot], self.length[slot], self.generated[slot] = start, 0, len(said)
        self.min_tokens[slot], self.seed[slot] = params.min_tokens, mix(seed)
        self.temperature[slot], self.top_p[slot], self.top_k[slot] = temperature_of(params), params.top_p, params.top_k
        self.repetition[slot] = params.repetition_penalty
        self.frequency[slot], self.presence[slot] = params.frequency_penalty, params.presence_penalty
        self.penalised[slot], self.biased[slot] = has_penalties(params), bool(params.logit_bias)
        if has_penalties(params):
            self._note_tokens(slot, prompt, said)
        if params.logit_bias:
            self.bias = self._matrix(self.bias, torch.float32)
            self.bias[slot] = 0
            ids = torch.tensor(list(params.logit_bias), device=self.device)
            self.bias[slot, ids] = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32).to(self.device)

    def _matrix(self, matrix: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if matrix is None:
            matrix = torch.zeros(self.num_slots + 1, self.vocabulary, dtype=dtype, device=self.device)
        return matrix

    def _note_tokens(self, slot: int, prompt: list[int], said: Sequence[int]) -> None:
        self.counts = self._matrix(self.counts, torch.int32)
        self.in_prompt = self._matrix(self.in_prompt, torch.bool)
        self.counts[slot] = 0
        self.in_prompt[slot] = False
        self.in_prompt[slot, torch.tensor(prompt, device=self.device)] = True
        if said:
            ids = torch.tensor(list(said), device=self.device)
            self.counts[slot].index_put_((ids,), torch.ones_like(ids, dtype=torch.int32), accumulate=True)

    def advance(self, rows: torch.Tensor, tokens: torch.Tensor, count: bool) -> None:
        """Note the tokens that were chosen for `rows`; the last thing a step does, so a failed step can be repeated."""
        tokens = tokens.clamp(min=0)
        if count:
            self.counts.index_put_((rows, tokens), torch.ones_like(rows, dtype=torch.int32), accumulate=True)
        self.last_token[rows] = tokens
        self.generated[rows] += 1


def temperature_of(params: SamplingParams) -> float:
    """The temperature, 0 for greedy: so is one so small that a score divided by it may be no float32 any more."""
    return params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request's scores depend on what was said."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
