"""Keys and values of all running requests in one pool of tokens, handed out in contiguous extents of whole blocks.

An extent holds one request from its first token to its last, so attention reads plain slices: no gather on a CPU, and
on a GPU the kernels take a start and a length. Dimensions: N tokens of the pool, G key/value heads, D head size.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import torch

BLOCK = 16  # tokens; extents begin and end on multiples of it


@dataclass
class Extent:
    """Tokens start .. start + size - 1 of the pool."""

    start: int
    size: int


def round_up(tokens: int) -> int:
    """The next multiple of BLOCK."""
    return -(-tokens // BLOCK) * BLOCK


class ExtentAllocator:
    """First-fit allocation of token ranges; neighbouring free ranges join at once."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._free = [(0, num_tokens)]  # (start, end), sorted, never touching each other

    @property
    def num_free(self) -> int:
        return sum(end - start for start, end in self._free)

    def allocate(self, tokens: int) -> Extent | None:
        """An extent of at least `tokens`, or None when no free range is long enough."""
        size = round_up(tokens)
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return Extent(start, size)
        return None

    def release(self, extent: Extent) -> None:
        """Give an extent back. Raises RuntimeError when a part of it is free already."""
        start, end = extent.start, extent.start + extent.size
        if start == end:
            return
        index = bisect_left(self._free, (start, end))
        before = self._free[index - 1] if index else None
        after = self._free[index] if index < len(self._free) else None
        if (before and before[1] > start) or (after and after[0] < end):
            raise RuntimeError(f"cache tokens {start}..{end} were released twice")
        if before and before[1] == start:
            self._free.remove(before)
            start = before[0]
        if after and after[0] == end:
            self._free.remove(after)
            end = after[1]
        insort(self._free, (start, end))

    def extend(self, extent: Extent, tokens: int) -> bool:
        """Lengthen an extent where it lies to at least `tokens`; False when the tokens behind it are not free."""
        end, wanted = extent.start + extent.size, round_up(tokens) - extent.size
        for index, (start, stop) in enumerate(self._free):
            if start == end and stop - start >= wanted:
                self._free[index : index + 1] = [(start + wanted, stop)] if stop - start > wanted else []
                extent.size += wanted
                return True
        return False

    def shrink(self, extent: Extent, tokens: int) -> None:
        """Give back what lies behind the first `tokens` (rounded up to a block)."""
        size = round_up(tokens)
        if size < extent.size:
            self.release(Extent(extent.start + size, extent.size - size))
            extent.size = size


class KeyValuePool:
    """One tensor (2, N + BLOCK, G, D) for each layer: keys, then values. The last block is scratch for empty rows."""

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, num_tokens + BLOCK, num_heads, head_size)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.scratch = num_tokens

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of `tokens` tokens to another, not overlapping place."""
        for layer in self.layers:
            layer[:, target : target + tokens].copy_(layer[:, source : source + tokens])


def bytes_per_token(num_layers: int, num_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Memory of one token's keys and values."""
    return 2 * num_layers * num_heads * head_size * dtype.itemsize
