"""Text files written whole or not at all, and JSON lines read back."""

import json
from pathlib import Path
from typing import Any


def write_aside(path: str | Path, text: str, encoding: str = "utf-8") -> None:
    """Write beside the target and rename, so that a reader never sees half a file. Line ends stay as they are."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding=encoding, newline="")
    aside.replace(path)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The object of every line with something in it.

    Lines end at line feeds alone: a text may hold U+2028, U+2029 or U+0085, at which str.splitlines() breaks too.
    Raises OSError when the file cannot be read, ValueError when it holds something else.
    """
    values = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError("a line is no JSON object")
    return values
