"""Text files written whole or not at all."""

from pathlib import Path


def write_aside(path: str | Path, text: str, encoding: str = "utf-8") -> None:
    """Write beside the target and rename, so that a reader never sees half a file. Line ends stay as they are."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding=encoding, newline="")
    aside.replace(path)
