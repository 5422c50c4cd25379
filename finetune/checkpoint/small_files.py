"""The files beside the weights: index, config, generation config, tokenizer."""

import json
from pathlib import Path
from typing import Any

from finetune.checkpoint.job import Job
from finetune.checkpoint.layouts import read_json
from finetune.checkpoint.manifest import Manifest
from finetune.checkpoint.source import DTYPES
from finetune.tensor_files import INDEX


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented UTF-8 JSON, under its name only when complete."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.chmod(0o644)
    partial.replace(path)


def write_small_files(job: Job, work: Manifest, token_ids: dict[str, int]) -> None:
    """Write everything a loader reads but the weights."""
    generation_file = job.source / "generation_config.json"
    generation = read_json(generation_file, "it has the sampling settings") if generation_file.exists() else {}
    write_json(job.partial / "config.json", job.layout.native_config(job.config, main_dtype(work), token_ids))
    write_json(job.partial / "generation_config.json", job.layout.generation_config(generation, token_ids))
    write_index(work, job.partial)
    job.layout.tokenizer().write_tokenizer(job.source, job.partial, job.config)


def write_index(work: Manifest, target: Path) -> None:
    """The index by which transformers finds each tensor; with it a single file needs no special name."""
    weight_map = {output.piece.target: unit.file for unit in work.units for output in unit.outputs}
    metadata = {"total_size": sum(unit.size for unit in work.units)}
    write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def main_dtype(work: Manifest) -> str:
    """torch name of the dtype that most bytes have."""
    sizes: dict[str, int] = {}
    for output in (o for unit in work.units for o in unit.outputs):
        sizes[output.dtype] = sizes.get(output.dtype, 0) + output.size
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])][1]
