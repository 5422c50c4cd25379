"""One page in two forms: Markdown, and HTML in a single file with its pictures inside."""

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.tables import markdown_table, width

SHORT = 16  # columns of a terminal
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #bbb;padding:.2em .6em;vertical-align:top;"
    "text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}.short{white-space:nowrap}img{max-width:100%}"
)


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of plain texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file."""

    path: Path
    title: str


Block = Heading | Text | Table | Picture


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The page for a file in `folder`; pictures are linked from there."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Table):
            parts.append("\n".join(markdown_table(block.header, block.rows)))
        else:
            parts.append(f"![{block.title}]({Path(os.path.relpath(block.path, folder)).as_posix()})")
    return "\n\n".join(parts) + "\n"


def html_page(blocks: Sequence[Block]) -> str:
    """The page as one HTML file that needs nothing else."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Table):
        return (
            "<table>\n"
            + "\n".join([_html_row(block.header, "th"), *(_html_row(row, "td") for row in block.rows)])
            + "\n</table>"
        )
    data = base64.b64encode(block.path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(block.title)}" src="data:image/png;base64,{data}"></p>'


def _html_row(cells: Sequence[str], tag: str) -> str:
    """A row; short cells stay on one line, long ones break anywhere, so that no column grows past the page."""
    marks = [' class="short"' if width(cell) <= SHORT and "\n" not in cell else "" for cell in cells]
    pairs = zip(marks, cells, strict=True)
    return "<tr>" + "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in pairs) + "</tr>"
