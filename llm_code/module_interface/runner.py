"""Runs a step on the device: one forward pass over decoding rows and prompt chunks, then the choice of tokens.

B decoding rows come first, the chunks' tokens behind them. What the next step needs (last tokens, lengths) stays on
the device, so on a GPU a step can start before the host has seen the tokens of the one before.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_code.module_interface.cache import KeyValuePool
from llm_code.module_interface.decoder import Decoder
from llm_code.module_interface.interface import Token
from llm_code.module_interface.operations import Operations, Segment
from llm_code.module_interface.sampler import Needs, Sampled, log_probabilities, sample
from llm_code.module_interface.scheduler import Chunk, Step
from llm_code.module_interface.sequence import Sequence
from llm_code.module_interface.slots import Slots


class StepAttention:
    """Attention of one step: stores new keys and values, then lets rows and chunks look at their requests' tokens."""

    def __init__(self, runner: "Runner", positions_T: Tensor, places_T: Tensor, num_decode: int) -> None:
        self.decoder, self.operations, self.pool = runner.decoder, runner.operations, runner.pool
        self.cos_TD, self.sin_TD = self.decoder.cos_PD[positions_T], self.decoder.sin_PD[positions_T]
        self.positions_T, self.places_T, self.num_decode = positions_T, places_T, num_decode
        self.starts_B = places_T[:num_decode] - positions_T[:num_decode]
        self.lengths_B = positions_T[:num_decode] + 1
        self.host_places: Many[tuple[int, int]] = ()  # (start, length) of the decoding rows, unless captured
        self.segments: Any = None  # the chunks' part, as the operations want it

    def __call__(self, layer: int, qkv_TC: Tensor, norms: tuple[Any, Any]) -> Tensor:
        decoder, keys_values, split = self.decoder, self.pool.layers[layer], self.num_decode
        q_THD = self.operations.rotate_and_store(
            qkv_TC.view(qkv_TC.shape[0], -1, decoder.head_size),
            decoder.num_heads,
            norms,
            self.cos_TD,
            self.sin_TD,
            keys_values,
            self.places_T,
        )
        outputs = []
        if split:
            where = (self.starts_B, self.lengths_B, self.host_places)
            outputs.append(self.operations.attend_decode(q_THD[:split], keys_values, *where, decoder.scaling))
        if self.segments is not None:
            outputs.append(self.operations.attend_prefill(q_THD[split:], keys_values, self.segments, decoder.scaling))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


@dataclass
class Pending:
    """A step under way: its sequences and the device's answers, on their way to the host."""

    sequences: list[Sequence]
    sampled: Sampled | None
    prompt_scores: list[tuple[Chunk, tuple[Tensor, Tensor, Tensor]]]
    finished_prompts: list[Sequence]  # those that want no token
    times_set_back: list[int]  # of each sequence when the step began
    ready: Any = None  # a CUDA event

    def answers(self) -> list[tuple[Sequence, Token]]:
        """The chosen tokens of those sequences that still wait for this step."""
        rows = zip(self.sequences, self.tokens(), self.times_set_back, strict=False)
        return [(sequence, token) for sequence, token, times in rows if times == sequence.times_set_back]

    def tokens(self) -> list[Token]:
        """The chosen tokens, one for each sequence; waits for the device. An id of -1 means that its scores failed."""
        if self.ready is not None:
            self.ready.synchronize()
        if self.sampled is None:
            return []
        ids = self.sampled.tokens.tolist()
        if self.sampled.logprobs is None:
            return [Token(i, "") for i in ids]
        scores = zip(
            *_lists(self.sampled.logprobs, self.sampled.alternatives, self.sampled.alternative_logprobs), strict=True
        )
        return [
            _token(i, sequence.params.logprobs, *score)
            for i, sequence, score in zip(ids, self.sequences, scores, strict=True)
        ]


def _lists(*tensors: Tensor) -> list[list]:
    return [tensor.tolist() for tensor in tensors]


def _token(token_id: int, wanted: int | None, logprob: float, ids: list[int], logprobs: list[float]) -> Token:
    if wanted is None:
        return Token(token_id, "")
    return Token(token_id, "", logprob, tuple(zip(ids[:wanted], logprobs[:wanted], strict=True)))


class Runner:
    """The device's side of the engine."""

    def __init__(
        self, decoder: Decoder, operations: Operations, pool: KeyValuePool, slots: Slots, end_ids: Many[int]
    ) -> None:
        self.decoder, self.operations, self.pool, self.slots = decoder, operations, pool, slots
        self.device = decoder.device
        self.end_ids = torch.tensor(list(end_ids), dtype=torch.int64, device=self.device)
        self._last_slots: list[int] | None = None
        self._last_rows = self.end_ids

    def launch(self, step: Step) -> Pending:
        """Start a step. On an error nothing has changed that running the step again would not set right."""
        with torch.inference_mode():
            logits_RV = self.decode_logits(step)
            if logits_RV is None:
                pending = self._choose(step, self._forward(step))
            else:
                pending = self._pending(list(step.decode), self._sample(step, list(step.decode), logits_RV))
        for sequence in step.decode:
            sequence.num_in_cache += 1
        for chunk in step.chunks:
            chunk.sequence.num_in_cache = chunk.end
        for sequence in pending.sequences:
            sequence.num_chosen += 1
        return pending

    def prepare(self) -> None:
        """What has to happen in the engine's thread before the first step."""

    def decode_logits(self, step: Step) -> Tensor | None:
        """Scores of a step without the forward pass below, where there is another way to them."""
        return None

    def to_device(self, numbers: list) -> Tensor:
        """Whole numbers as a tensor, without waiting for the device's work."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        if self.device.type != "cuda" or not tensor.numel():
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def free_memory(self) -> None:
        """Return what the allocator keeps for later, after memory ran out."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows(self, sequences: Many[Sequence]) -> Tensor:
        """The sequences' slots; the same tensor as long as they stay the same."""
        slots = [sequence.slot for sequence in sequences]
        if slots != self._last_slots:
            self._last_slots, self._last_rows = slots, self.to_device(slots)
        return self._last_rows

    def _forward(self, step: Step) -> Tensor:
        """(T, C) states of all tokens of a step."""
        rows = self._rows(step.decode)
        new_ids = [i for chunk in step.chunks for i in chunk.sequence.context[chunk.begin : chunk.end]]
        positions = [i for chunk in step.chunks for i in range(chunk.begin, chunk.end)]
        places = [chunk.sequence.extent.start + i for chunk in step.chunks for i in range(chunk.begin, chunk.end)]
        new = self.to_device([new_ids, positions, places])
        lengths = self.slots.length[rows]
        ids_T = torch.cat([self.slots.last_token[rows], new[0]])
        positions_T = torch.cat([lengths, new[1]])
        places_T = torch.cat([self.slots.start[rows] + lengths, new[2]])
        attention = StepAttention(self, positions_T, places_T, len(step.decode))
        attention.host_places = [(s.extent.start, s.num_in_cache + 1) for s in step.decode]
        if step.chunks:
            attention.segments = self.operations.plan_segments(list(_segments(step.chunks)), self.device)
        return self.decoder.hidden(ids_T, self.operations, attention)

    def _choose(self, step: Step, hidden_TC: Tensor) -> Pending:
        """Choose tokens where a row or a prompt is complete, and note them on the device."""
        sequences, places, offset = step.choosing(), list(range(len(step.decode))), len(step.decode)
        prompt_scores, finished = [], []
        for chunk in step.chunks:
            size = chunk.end - chunk.begin
            if chunk.sequence.params.prompt_logprobs is not None and not chunk.sequence.tokens:
                prompt_scores.append((chunk, self._prompt_scores(chunk, hidden_TC[offset : offset + size])))
            offset += size
            if chunk.is_last and chunk.sequence.max_tokens > 0:
                places.append(offset - 1)
            elif chunk.is_last:
                finished.append(chunk.sequence)
        sampled = None
        if sequences:
            chosen_RC = hidden_TC if len(places) == len(hidden_TC) else hidden_TC[self.to_device(places)]
            sampled = self._sample(step, sequences, self.decoder.logits(chosen_RC))
        return self._pending(sequences, sampled, prompt_scores, finished)

    def _pending(
        self,
        sequences: list[Sequence],
        sampled: Sampled | None,
        prompt_scores: Many[tuple[Chunk, tuple[Tensor, Tensor, Tensor]]] = (),
        finished: Many[Sequence] = (),
    ) -> Pending:
        """The answers on their way to the host."""
        ready = None
        if sampled is not None and self.device.type == "cuda":
            sampled = Sampled(*(None if t is None else _to_host(t) for t in vars(sampled).values()))
            ready = torch.cuda.Event()
            ready.record()
        times = [sequence.times_set_back for sequence in sequences]
        return Pending(sequences, sampled, list(prompt_scores), list(finished), times, ready)

    def _sample(self, step: Step, sequences: list[Sequence], logits_RV: Tensor) -> Sampled:
        needs = Needs.of(sequence.params for sequence in sequences)
        rows = self._rows(sequences)
        sampled = sample(logits_RV, rows, needs, self.slots, self.end_ids)
        for chunk in step.chunks:
            self.slots.length[chunk.sequence.slot] = chunk.end
        if step.decode:
            self.slots.length[rows[: len(step.decode)]] += 1
        self.slots.advance(rows, sampled.tokens, count=needs.penalties)
        return sampled

    def _prompt_scores(self, chunk: Chunk, hidden_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the prompt's tokens behind each of the chunk's, but for the last of all."""
        targets = chunk.sequence.prompt[chunk.begin + 1 : chunk.end + 1]
        logits_TV = self.decoder.logits(hidden_TC[: len(targets)])
        ids = self.to_device(targets)
        return log_probabilities(logits_TV, ids, chunk.sequence.params.prompt_logprobs)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy under way to pinned memory; the caller waits for an event behind it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _segments(chunks: Many[Chunk]):
    offset = 0
    for chunk in chunks:
        size = chunk.end - chunk.begin
        yield Segment(offset, offset + size, chunk.sequence.extent.start, chunk.end)
        offset += size
