"""The files beside the weights: index, config, generation config, tokenizer."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint import tokenizer_baichuan2, tokenizer_qwen1
from finetune.checkpoint.layouts import read_json
from finetune.checkpoint.manifest import Manifest
from finetune.tensor_files import INDEX

TOKENIZERS: dict[str, ModuleType] = {"qwen1": tokenizer_qwen1, "baichuan2": tokenizer_baichuan2}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_index(work: Manifest, target: Path) -> None:
    """The index by which transformers finds each tensor; with it a single file needs no special name."""
    weight_map = {output.piece.target: unit.file for unit in work.units for output in unit.outputs}
    metadata = {"total_size": sum(unit.size for unit in work.units)}
    write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_small_files(layout: ModuleType, config: dict[str, Any], dtype: str, source: Path, target: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    tokenizer = TOKENIZERS[layout.NAME]
    token_ids = tokenizer.token_ids(source)
    generation_file = source / "generation_config.json"
    generation = read_json(generation_file, "it has the sampling settings") if generation_file.exists() else {}
    write_json(target / "config.json", layout.native_config(config, dtype, token_ids))
    write_json(target / "generation_config.json", layout.generation_config(generation, token_ids))
    tokenizer.write_tokenizer(source, target, config)
