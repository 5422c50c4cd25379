"""JSON files that people edit: what is wrong with one is told in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.lines import not_utf8


def read_json_object(
    path: str | Path, what: str, advice: str, object_pairs_hook: Callable[[list], dict] | None = None
) -> dict[str, Any]:
    """The object in a file; a UTF-8 BOM is skipped.

    Raises UserError when there is none: `what` the file is called, `advice` for whoever has no such file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}. {advice}") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, what, error) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object {{...}}, found {type(content).__name__}.")
    return content
