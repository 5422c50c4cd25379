"""JSON as the standard has it: no NaN, no infinite numbers, no repeated or endless keys, valid Unicode only."""

import json
import math
from typing import Any, NoReturn

MAX_KEYS = 1024  # of one object; the largest honest one is logit_bias
MAX_DIGITS = 25


class JsonError(ValueError):
    """The text says what is wrong, never what was sent."""


def parse(body: bytes) -> Any:
    """The value of a UTF-8 body. Raises JsonError."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"expected UTF-8, found an invalid byte at position {error.start}") from None
    if not text.strip():
        raise JsonError("expected a JSON object, found an empty body")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
        )
        if "\\u" in text:  # only an escape can smuggle half a surrogate pair in
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise JsonError("expected JSON of ordinary depth, found one nested too deep") from None
    except UnicodeEncodeError:
        raise JsonError("expected Unicode text, found half of a surrogate pair (\\ud800 to \\udfff)") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"expected JSON: {error.msg} at position {error.pos}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise JsonError(f"expected at most {MAX_KEYS} keys in an object, found {len(pairs)}")
    value = dict(pairs)
    if len(value) < len(pairs):
        raise JsonError("expected every key once, found one repeated in the same object")
    return value


def _constant(name: str) -> NoReturn:
    raise JsonError(f"expected a number, found {name}, which JSON does not have")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JsonError(f"expected an integer of at most {MAX_DIGITS} digits, found {len(digits)}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError("expected a number within the range of 64-bit floats, found a larger one")
    return value
