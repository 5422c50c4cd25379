"""Text files of a row a line, as people bring them: read alike everywhere, with advice for other spellings."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError

ONE_A_LINE = (
    "python3 -c 'import json, sys; [print(json.dumps(row, ensure_ascii=False)) for row in json.load(sys.stdin.buffer)]'"
)


def numbered_lines(path: str | Path, what: str, json_lines: bool = True) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of every line that is not blank; a UTF-8 BOM is skipped.

    Raises UserError for a file that cannot be read, is no UTF-8 or, where `json_lines` are expected, holds one array.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                if json_lines and text.lstrip().startswith("["):
                    written = f"{ONE_A_LINE} < {_quoted(path)} > {_quoted(path, '.jsonl')}"
                    raise UserError(
                        f"{path}:{number}: expected a JSON object a line, found an array. If the file is one array, "
                        f"write its rows a line each: {written}"
                    )
                yield number, text.rstrip("\n")
    except OSError as error:
        raise UserError(f"{path}: expected {what}, but {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, what, error) from None


def not_utf8(path: str | Path, what: str, error: UnicodeDecodeError) -> UserError:
    """The error for a file in another encoding, with the command that converts it."""
    return UserError(
        f"{path}: expected {what} in UTF-8, found byte 0x{error.object[error.start]:02x}. "
        f"Convert it first; from GBK: iconv -f GBK -t UTF-8 {_quoted(path)} > {_quoted(path, Path(path).suffix)}"
    )


def _quoted(path: str | Path, suffix: str | None = None) -> str:
    """The path as a shell takes it; with a suffix, a new name beside it."""
    path = Path(path)
    return shlex.quote(str(path if suffix is None else path.with_name(f"{path.stem}-converted{suffix}")))
