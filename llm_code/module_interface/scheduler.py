"""Which requests run, and what the next step computes: admission by slots and cache tokens, long prompts in chunks.

A request is admitted with room for its prompt and the beginning of an answer, and gets more as the answer grows. When
there is no more, the request that came last is set back: it waits with what it has said, and goes on later.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from llm_code.module_interface.cache import BLOCK, ExtentAllocator, KeyValuePool
from llm_code.module_interface.interface import (
    CANCELLED,
    ERROR,
    EngineError,
    QueueTimeout,
    RequestFailed,
)
from llm_code.module_interface.prefixes import MIN_SHARED, PrefixStore, Shared
from llm_code.module_interface.sequence import Sequence
from llm_code.module_interface.slots import Slots

ROOM = 256  # answer tokens that a request gets room for at once


@dataclass(frozen=True)
class Chunk:
    """Tokens begin .. end - 1 of a prompt (and of an answer that was set back), computed in one step."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.sequence.context)


@dataclass(frozen=True)
class Step:
    """What one forward pass computes: one token for each of `decode`, and chunks of prompts."""

    decode: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)

    def choosing(self) -> list[Sequence]:
        """The sequences that get a token from this step, in the order of its rows."""
        return [*self.decode, *(c.sequence for c in self.chunks if c.is_last and c.sequence.max_tokens > 0)]

    def parts(self) -> "Iterator[Step]":
        """The same work, one sequence at a time."""
        yield from (Step((sequence,), ()) for sequence in self.decode)
        yield from (Step((), (chunk,)) for chunk in self.chunks)


@dataclass(frozen=True)
class PrefillBudget:
    """Prompt tokens of one step: while others wait for their next token, and while none does."""

    shared: int
    alone: int


class Scheduler:
    """Waiting and running sequences. Used by the engine's thread alone; the counters may be read by any."""

    def __init__(self, pool: KeyValuePool, slots: Slots, budget: PrefillBudget, queue_timeout: float | None) -> None:
        self.pool, self.slots, self.budget, self.queue_timeout = pool, slots, budget, queue_timeout
        self.allocator = ExtentAllocator(pool.scratch)
        self.prefixes = PrefixStore(self.allocator)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_slots = list(range(slots.num_slots - 1, -1, -1))
        self.ended: Counter[str] = Counter()
        self.num_prompt_tokens = self.num_cached_tokens = self.num_generated = self.num_set_back = 0

    def plan(self) -> Step:
        """The next step, after letting leave who must and join who can."""
        self._reap()
        self._admit()
        self._make_place()
        decode = tuple(sequence for sequence in self.running if sequence.wants_token)
        return Step(decode, tuple(self._chunks(self.budget.shared if decode else self.budget.alone)))

    def _chunks(self, budget: int) -> Iterator[Chunk]:
        """Half the budget to the oldest prompt, the rest to the shortest: a long prompt delays nobody and arrives."""
        prompts = [sequence for sequence in self.running if sequence.is_prefilling]
        if not prompts:
            return
        oldest = prompts[0]
        given: dict[int, int] = {}
        for sequence in sorted(prompts[1:], key=lambda s: len(s.context) - s.num_in_cache):
            room = budget - budget // 2 - sum(given.values())
            if room > 0:
                given[id(sequence)] = min(room, len(sequence.context) - sequence.num_in_cache)
        given[id(oldest)] = min(budget - sum(given.values()), len(oldest.context) - oldest.num_in_cache)
        room = budget - sum(given.values())
        for sequence in prompts:
            begin = sequence.num_in_cache
            extra = min(room, len(sequence.context) - begin - given.get(id(sequence), 0))
            room -= extra
            if size := given.get(id(sequence), 0) + extra:
                yield Chunk(sequence, begin, begin + size)

    def _reap(self) -> None:
        for sequence in [s for s in self.running if s.cancelled]:
            self.end(sequence, CANCELLED)
        now = time.monotonic()
        for sequence in list(self.waiting):
            waited = now - sequence.request.submitted
            if sequence.cancelled:
                self.end(sequence, CANCELLED)
            elif self.queue_timeout is not None and waited > self.queue_timeout and sequence.request.started is None:
                error = QueueTimeout(f"the request waited {waited:.1f} s for its turn; try again later.")
                self.end(sequence, ERROR, error)

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if not self.free_slots:
                return
            running = [(s.prompt, s.extent.start, min(s.num_in_cache, len(s.prompt))) for s in self.running]
            shared, promised = self.prefixes.find(sequence.context, running)
            if promised - (shared.length if shared else 0) >= MIN_SHARED:
                continue  # a running prompt is about to compute what this one shares with it
            try:
                if not self._join(sequence, shared):
                    return
            except Exception as error:
                self.end(sequence, ERROR, RequestFailed(f"the request could not be started: {error}"))
                continue
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.request.started = sequence.request.started or time.monotonic()

    def _join(self, sequence: Sequence, shared: Shared | None) -> bool:
        """Give the sequence its place in the cache and its slot; False while the cache has no room for it."""
        extent = self.prefixes.allocate(len(sequence.context) + min(sequence.num_left, ROOM))
        if extent is None:
            return False
        sequence.extent, sequence.slot = extent, self.free_slots.pop()
        said = sequence.tokens
        self.slots.join(sequence.slot, extent.start, sequence.prompt, sequence.params, sequence.seed, said)
        # scores of all positions are wanted for prompt_logprobs, so nothing is taken over then
        if shared and sequence.params.prompt_logprobs is None and self._still_there(shared):
            self.pool.copy(shared.start, extent.start, shared.length)
            sequence.num_in_cache = shared.length
        if not sequence.times_set_back:
            sequence.num_cached_tokens = sequence.num_in_cache
            self.num_prompt_tokens += len(sequence.prompt)
            self.num_cached_tokens += sequence.num_cached_tokens
        return True

    def _make_place(self) -> None:
        """See that every answer has room for its next token, the oldest request first."""
        for sequence in sorted(self.running, key=lambda s: s.request.submitted):
            while sequence.slot is not None and sequence.wants_token and sequence.num_in_cache >= sequence.extent.size:
                if not self._grow(sequence):
                    self._set_back(max(self.running, key=lambda s: s.request.submitted))

    def _grow(self, sequence: Sequence) -> bool:
        """More room for an answer, where it lies or elsewhere; False when there is none."""
        extent = sequence.extent
        most = min(len(sequence.prompt) + sequence.max_tokens, extent.size + ROOM)
        for tokens in (most, sequence.num_in_cache + 1):
            if self.allocator.extend(extent, tokens):
                return True
            if larger := self.prefixes.allocate(tokens):
                self.pool.copy(extent.start, larger.start, sequence.num_in_cache)
                self.slots.start[sequence.slot] = larger.start
                self.allocator.release(extent)
                sequence.extent = larger
                return True
        return False

    def _set_back(self, sequence: Sequence) -> None:
        """Take the place of a running sequence; it is the first to join again."""
        self.num_set_back += 1
        self.running.remove(sequence)
        self.free_slots.append(sequence.slot)
        self.prefixes.keep(sequence.known_tokens(), sequence.extent)
        sequence.set_back()
        self.waiting.appendleft(sequence)

    def _still_there(self, shared: Shared) -> bool:
        return self.prefixes.holds(shared) or any(s.extent.start == shared.start for s in self.running)

    def make_room(self) -> None:
        """After memory ran out: keep no finished prompt, and compute prompts in smaller chunks from now on."""
        self.prefixes.clear()
        self.budget = PrefillBudget(*(max(size // 2, BLOCK) for size in (self.budget.shared, self.budget.alone)))

    def end(self, sequence: Sequence, reason: str, error: EngineError | None = None) -> None:
        """Finish a sequence early and free what it holds."""
        if not sequence.finished:
            try:
                if error is None:
                    sequence.finish(reason)
                else:
                    sequence.deliver((), reason, None, error)
            except Exception:  # of the consumer's callback: there is nobody left to tell
                sequence.finish_reason = reason
        self.leave(sequence, reason)

    def leave(self, sequence: Sequence, reason: str) -> None:
        """Free the place of a finished sequence; its prompt stays in the cache while there is room."""
        self.ended[reason] += 1
        self.num_generated += len(sequence.tokens)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence.slot is not None:
            self.free_slots.append(sequence.slot)
        if sequence.extent is not None:
            if reason == ERROR:
                self.allocator.release(sequence.extent)
            else:
                self.prefixes.keep(sequence.known_tokens(), sequence.extent)
        sequence.slot = sequence.extent = None
