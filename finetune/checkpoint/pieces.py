"""The unit of a conversion: rows of a source tensor that become one target tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """`target` is rows start..stop of `source` (all rows when stop is None), L2-normalised row by row if asked."""

    target: str
    source: str
    start: int = 0
    stop: int | None = None
    normalize_rows: bool = False

    def shape(self, source_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the target, given that of the source."""
        stop = source_shape[0] if self.stop is None else self.stop
        return (stop - self.start, *source_shape[1:])


def split_in_three(source: str, targets: tuple[str, str, str], rows: int) -> list[Piece]:
    """A tensor of 3 x rows rows as three of rows each (fused query, key, value)."""
    return [Piece(target, source, i * rows, (i + 1) * rows) for i, target in enumerate(targets)]
