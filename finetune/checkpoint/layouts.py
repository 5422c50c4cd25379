"""Knows a checkpoint by its config.json: Qwen-1, Baichuan2, native, or a reason to refuse."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint import baichuan2, qwen1
from finetune.errors import UserError

LEGACY: dict[str, ModuleType] = {"qwen": qwen1, "baichuan": baichuan2}
BY_NAME: dict[str, ModuleType] = {layout.NAME: layout for layout in LEGACY.values()}
MARKER = "conversion.json"
DOWNLOAD_MARKER = "download.json"


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the purpose if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {purpose}. Name a checkpoint folder, or run the download step first."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {purpose}. Download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}. Download it again.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    return read_json(folder / "config.json", "it tells which model this is")


def detect_layout(config: dict[str, Any]) -> ModuleType | None:
    """The module of the legacy layout, or None for a native checkpoint.

    Raises UserError for a model that neither transformers nor this converter knows, and for a legacy one that has no
    exact native form.
    """
    model_type = config.get("model_type")
    layout = LEGACY.get(model_type)
    if layout is None:
        if not is_native(model_type):
            raise UserError(
                f"config.json has model_type {model_type!r}, expected qwen, baichuan or one that transformers knows: "
                "this model needs its own remote code, which this project does not run."
            )
        return None
    if config.get("quantization_config"):
        raise UserError(
            "this is a quantised checkpoint (quantization_config in config.json): training needs the 16-bit one. "
            "Download the repository without -Int4 or -Int8 in its name."
        )
    layout.check_config(config)
    return layout


def is_native(model_type: Any) -> bool:
    """Whether transformers has a class for it."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def finished_conversion(target: Path) -> dict[str, Any] | None:
    """The marker of a finished conversion in target, or None."""
    path = target / MARKER
    return read_json(path, "it marks a finished conversion") if path.exists() else None


def download_record(folder: Path) -> dict[str, Any] | None:
    """Which hub, id and revision a folder was downloaded from, or None if it was not finetune.download's doing."""
    path = folder / DOWNLOAD_MARKER
    return read_json(path, "it marks a finished download") if path.exists() else None
