"""Text files of a row a line, as people bring them: read alike everywhere, with advice for other spellings."""

import codecs
import shlex
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError

ONE_A_LINE = (
    "python3 -c 'import json, sys; [print(json.dumps(row, ensure_ascii=False)) for row in json.load(sys.stdin.buffer)]'"
)


def numbered_lines(path: str | Path, what: str, json_lines: bool = True) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of every line that is not blank; a UTF-8 BOM is skipped.

    Raises UserError for a file that cannot be read, is no UTF-8 or, where `json_lines` are expected, holds other JSON.
    """
    is_first = True
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                if json_lines:
                    _check_object(path, number, text.strip(), is_first)
                is_first = False
                yield number, text.rstrip("\n")
    except OSError as error:
        raise UserError(f"{path}: expected {what}, but {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, what, error) from None


def _check_object(path: str | Path, number: int, text: str, is_first: bool) -> None:
    """Refuse what is no mistake in a row but another form of the file."""
    if is_first and text == "{":
        raise UserError(
            f"{path}:{number}: expected a JSON object a line, found the beginning of one that goes over several. "
            "Write each row in one line."
        )
    if text.startswith("["):
        written = f"{ONE_A_LINE} < {_quoted(path)} > {_quoted(path, '.jsonl')}"
        raise UserError(
            f"{path}:{number}: expected a JSON object a line, found an array. If the file is one array, write its rows "
            f"a line each: {written}"
        )


def not_utf8(path: str | Path, what: str, error: UnicodeDecodeError) -> UserError:
    """The error for a file in another encoding, with the command that converts it."""
    encoding = "UTF-16" if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "GBK"
    command = f"iconv -f {encoding} -t UTF-8 {_quoted(path)} > {_quoted(path, Path(path).suffix)}"
    return UserError(
        f"{path}: expected {what} in UTF-8, found byte 0x{error.object[error.start]:02x}. "
        f"Convert it first; from {encoding}: {command}"
    )


def _quoted(path: str | Path, suffix: str | None = None) -> str:
    """The path as a shell takes it; with a suffix, a new name beside it."""
    path = Path(path)
    return shlex.quote(str(path if suffix is None else path.with_name(f"{path.stem}-converted{suffix}")))
