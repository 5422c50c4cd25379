"""Tables as plain text, aligned also with Chinese in them, and as Markdown."""

import re
import unicodedata
from collections.abc import Sequence

Row = Sequence[str]
NUMBER = re.compile(r"[-+]?[\d.,]+(e-?\d+)?( %| points)?|-")
TAG = re.compile(r"<(?=[A-Za-z/!?])")
LINE_END = re.compile(r"\r\n|\r|\n")


def width(text: str) -> int:
    """Columns a text takes on a terminal: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def text_table(header: Row, rows: Sequence[Row]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    table = [header, *rows]
    widths = [max(width(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        gaps = [" " * (size - width(cell)) for size, cell in zip(widths, row, strict=True)]
        cells = [row[0] + gaps[0], *(gap + cell for gap, cell in zip(gaps[1:], row[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown_table(header: Row, rows: Sequence[Row]) -> list[str]:
    """The same as Markdown, columns of numbers to the right; line ends, bars and tags inside a cell are only shown."""
    right = [bool(rows) and all(NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(header))]
    lines = [header, ["---:" if is_number else "---" for is_number in right], *rows]
    return ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in lines]


def _markdown_cell(text: str) -> str:
    """What a page shows as this text. A < that opens no tag stays, as in < 0.001."""
    return LINE_END.sub("<br>", TAG.sub("&lt;", text.replace("|", "\\|")))


def percent(value: float) -> str:
    """0.9081 -> 90.8 %."""
    return f"{100 * value:.1f} %"
