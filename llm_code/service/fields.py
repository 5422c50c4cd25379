"""Fields that are more than a type and a range: how they are read, and how the schema describes them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_PROMPTS = 256
STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
STOPS = {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}
TEXT_OR_PARTS = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
        {"type": "null"},
    ]
}
TEXT = {"type": "string", "minLength": 1}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
SEVERAL = {"type": "array", "items": {"anyOf": [TEXT, TOKENS]}, "minItems": 1, "maxItems": MAX_PROMPTS}
PROMPTS = {"anyOf": [TEXT, TOKENS, SEVERAL]}
BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


def read_stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"expected at most {MAX_STOPS} texts, got {len(stops)}")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"expected texts of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def read_content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a text or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected parts of type text; this model reads nothing else, got {str(kind)[:40]}")
        texts.append(part["text"])
    return "".join(texts)


def read_prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text, a list of texts, a list of token ids or a list of such lists")
    prompts = [value] if all(_is_id(item) for item in value) else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"expected at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(_is_id, prompt))):
            raise ValueError("expected texts or lists of token ids (integers from 0), each with at least one")
    return prompts


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def read_biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("expected an object of token id: bias")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError("expected token ids as keys")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("expected biases from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def refuse(value: Any) -> None:
    if value:
        raise ValueError("not supported by this model")


Stops = Annotated[Any, BeforeValidator(read_stops), WithJsonSchema(STOPS)]
Content = Annotated[Any, BeforeValidator(read_content), WithJsonSchema(TEXT_OR_PARTS)]
Prompts = Annotated[Any, BeforeValidator(read_prompts), WithJsonSchema(PROMPTS)]
Biases = Annotated[Any, BeforeValidator(read_biases), WithJsonSchema(BIASES)]
Unsupported = Annotated[Any, BeforeValidator(refuse), WithJsonSchema({"enum": [None, False, "", [], {}]})]
