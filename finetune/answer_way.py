"""How an evaluation had its answers made, read from the file beside its records: two models are compared in one way."""

import json
from itertools import product
from pathlib import Path
from typing import Any

from finetune.errors import UserError

SETTINGS = ("ntrain", "max_new_tokens", "temperature", "top_p")


def way_of(config: dict[str, Any]) -> dict[str, Any]:
    """Written text or the likeliest label, and the settings that change it; engine and service write the same text."""
    way = config.get("answer") or config.get("mode")
    written = {"answers": "likelihood" if way == "likelihood" else "written text"} if way else {}
    return written | {key: config[key] for key in SETTINGS if key in config}


def read_way(records: Path) -> dict[str, Any]:
    """The way of an evaluation by its records; nothing when what made them is not told."""
    return way_of(read_config(records))


def read_config(records: Path) -> dict[str, Any]:
    """All settings of an evaluation by its records, the fingerprints of its weights among them; {} if not told."""
    places = [records.with_suffix(".json"), records.with_name(records.stem + "_metrics.json")]
    if records.name == "answers.jsonl":
        places.append(records.with_name("report.json"))
    for place in places:
        try:
            about = json.loads(place.read_text(encoding="utf-8"))
            return about.get("config") or (about.get("generation") or {}).get("config") or {}
        except (OSError, ValueError, AttributeError):
            continue
    return {}


def differing(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """A setting that both ways tell and that differs, None where they are one way."""
    return next((key for key in sorted(first.keys() & second.keys()) if first[key] != second[key]), None)


def check_same_way(first: dict[str, Any], second: dict[str, Any], name: str) -> None:
    """Raise UserError when a setting that both tell differs: the difference would not be the model's alone."""
    if key := differing(first, second):
        raise UserError(
            f"{name}: expected both models asked in one way, found {key} {first[key]} and {second[key]}. "
            "Evaluate one of them again with the other's settings."
        )


def pair_asked_alike(before: Path, after: Path) -> tuple[Path, Path]:
    """The two records, or of runs with other settings, which stand in folders beside them, those of one way.

    An evaluation leaves a run with other settings its place and goes into a folder there. Where no two are of one way,
    those asked for.
    """
    pairs = product(*([path, *sorted(path.parent.glob(f"*/{path.name}"))] for path in (before, after)))
    alike = (pair for pair in pairs if not differing(*map(read_way, pair)))
    return next(alike, (before, after))
