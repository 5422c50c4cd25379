"""Prompts computed once: a new prompt takes over the keys and values of the longest beginning it shares with others.

Sources are the running requests and finished ones, whose extents stay until their room is needed (least recently used
first). The shared part is copied into the new request's own extent, which costs a thousandth of computing it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llm_code.module_interface.cache import BLOCK, Extent, ExtentAllocator

MAX_KEPT = 128  # finished prompts; every admission looks through them
MIN_SHARED = BLOCK  # tokens; less is computed faster than found


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal tokens at the beginning of two lists; 0 where it is less than MIN_SHARED."""
    if first[:MIN_SHARED] != second[:MIN_SHARED] or min(len(first), len(second)) < MIN_SHARED:
        return 0
    low, high = MIN_SHARED, min(len(first), len(second))
    while low < high:  # compared slice by slice: a thousand tokens take microseconds
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class Kept:
    """The tokens of a finished request whose keys and values still lie in `extent`."""

    tokens: list[int]
    extent: Extent


@dataclass(frozen=True)
class Shared:
    """Where the beginning of a prompt is found: `length` tokens from `start` on."""

    start: int
    length: int


class PrefixStore:
    """Extents of finished requests, given up one after the other when the allocator needs room."""

    def __init__(self, allocator: ExtentAllocator) -> None:
        self.allocator = allocator
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # by start, least recently used first

    @property
    def num_tokens(self) -> int:
        return sum(kept.extent.size for kept in list(self._kept.values()))

    def keep(self, tokens: list[int], extent: Extent) -> None:
        """Take over the extent of a finished request that holds these tokens."""
        self.allocator.shrink(extent, len(tokens))
        if len(tokens) < MIN_SHARED:
            self.allocator.release(extent)
            return
        for start, kept in list(self._kept.items()):
            if shared_length(kept.tokens, tokens) == len(kept.tokens):
                self._give_up(start)
        self._kept[extent.start] = Kept(tokens, extent)
        while len(self._kept) > MAX_KEPT:
            self._give_up(next(iter(self._kept)))

    def find(self, prompt: Sequence[int], running: Iterable[tuple[list[int], int, int]]) -> tuple[Shared | None, int]:
        """(longest shared beginning that is computed, its length once all running prompts are computed).

        `running` yields (prompt, start, tokens computed). The last token of a prompt is never taken over: its scores
        choose the first token of the answer.
        """
        limit = len(prompt) - 1
        best, promised = None, 0
        for kept in self._kept.values():
            length = min(shared_length(kept.tokens, prompt), limit)
            if length >= MIN_SHARED and (best is None or length > best.length):
                best = Shared(kept.extent.start, length)
        for tokens, start, computed in running:
            length = min(shared_length(tokens, prompt), limit)
            promised = max(promised, length)
            length = min(length, computed)
            if length >= MIN_SHARED and (best is None or length > best.length):
                best = Shared(start, length)
        if best and best.start in self._kept:
            self._kept.move_to_end(best.start)
        return best, max(promised, best.length if best else 0)

    def allocate(self, tokens: int) -> Extent | None:
        """An extent of the allocator, giving up kept prompts until there is one."""
        while True:
            extent = self.allocator.allocate(tokens)
            if extent or not self._kept:
                return extent
            self._give_up(next(iter(self._kept)))

    def holds(self, shared: Shared) -> bool:
        """Whether the source is a kept prompt that has not been given up."""
        return shared.start in self._kept

    def clear(self) -> None:
        """Give up everything, for example when memory ran out."""
        while self._kept:
            self._give_up(next(iter(self._kept)))

    def _give_up(self, start: int) -> None:
        self.allocator.release(self._kept.pop(start).extent)
