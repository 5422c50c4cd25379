"""The plan of a conversion as a file: which target file takes which pieces, and which are on disk and verified.

`conversion_manifest.json` lies in TARGET.partial from before the first target file until the end. A killed conversion
goes on from it, also when verified source files have been removed meanwhile.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint.pieces import Piece
from finetune.checkpoint.source import DTYPES, Stored
from finetune.errors import UserError

MANIFEST = "conversion_manifest.json"
MAX_SHARD_BYTES = 4_000_000_000
SAMPLE_BYTES = 65_536


@dataclass(frozen=True)
class Output:
    """One target tensor: the piece it is, its safetensors dtype name and its shape."""

    piece: Piece
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return DTYPES[self.dtype][0] * math.prod(self.shape)


@dataclass
class Unit:
    """One target file, made from one source file; `digests` (tensor -> sha256) is filled once verified on disk."""

    file: str
    source: str
    outputs: list[Output]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return sum(output.size for output in self.outputs)

    @property
    def is_done(self) -> bool:
        return bool(self.digests)


@dataclass
class Manifest:
    """All units of one conversion, and the sizes and marks of the source files by which a restart knows its source."""

    layout: str
    config: dict[str, Any]
    source_sizes: dict[str, int]
    units: list[Unit]
    source_marks: dict[str, str] = field(default_factory=dict)


def plan(layout: ModuleType, config: dict[str, Any], folder: Path, stored: dict[str, Stored]) -> Manifest:
    """Cut the target into files of at most MAX_SHARD_BYTES, each from one source file, in the order of the files."""
    check_tensors(layout, config, stored)
    by_file: dict[str, list[Output]] = {}
    for piece in layout.pieces(config):
        place = stored[piece.source]
        by_file.setdefault(place.file, []).append(Output(piece, place.dtype, piece.shape(place.shape)))
    groups = [(file, group) for file in sorted(by_file) for group in cut(by_file[file])]
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    units = [Unit(name, file, group) for name, (file, group) in zip(names, groups, strict=True)]
    sizes = {file: (folder / file).stat().st_size for file in by_file}
    return Manifest(layout.NAME, config, sizes, units, {file: mark_of(folder / file) for file in by_file})


def mark_of(path: Path) -> str:
    """Digest of a file's beginning, middle and end: a chat model and its base have one config and one size."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as stream:
        for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            stream.seek(max(0, start))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def differing_marks(marks: dict[str, str], folder: Path) -> list[str]:
    """Files of the folder that are not those of which the marks are; one that is gone is not among them."""
    return [file for file, mark in marks.items() if (folder / file).exists() and mark_of(folder / file) != mark]


def planned_shapes(work: Manifest) -> dict[str, tuple[int, ...]]:
    """Target tensor -> shape, over all units."""
    return {output.piece.target: output.shape for unit in work.units for output in unit.outputs}


def cut(outputs: list[Output]) -> list[list[Output]]:
    """Consecutive groups of at most MAX_SHARD_BYTES (one tensor at least)."""
    groups: list[list[Output]] = [[]]
    for output in outputs:
        if groups[-1] and sum(o.size for o in groups[-1]) + output.size > MAX_SHARD_BYTES:
            groups.append([])
        groups[-1].append(output)
    return groups


def check_tensors(layout: ModuleType, config: dict[str, Any], stored: dict[str, Stored]) -> None:
    """Raise UserError unless the source has exactly the tensors of the layout, in their shapes and a plain dtype."""
    expected = layout.source_shapes(config)
    unknown = [name for name in stored if name not in expected and not name.endswith(layout.IGNORED_SUFFIXES)]
    missing = [name for name in expected if name not in stored]
    for names, what in ((unknown, "unknown tensors"), (missing, "tensors missing")):
        if names:
            raise UserError(
                f"cannot convert exactly: {len(names)} {what} for {layout.TITLE}, first {names[0]}. "
                "Expected the published checkpoint; download it again or name another."
            )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"cannot convert exactly: {name} has shape {stored[name].shape}, config.json wants {shape}. "
                "The weights and config.json belong to different models."
            )
        if stored[name].dtype not in DTYPES:
            raise UserError(f"cannot convert exactly: {name} is {stored[name].dtype}, expected {', '.join(DTYPES)}.")


def save(manifest: Manifest, folder: Path) -> None:
    """Write the manifest so that a kill leaves the old or the new one."""
    path = folder / MANIFEST
    partial = path.with_suffix(".tmp")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync(folder)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(folder: Path) -> Manifest | None:
    """The manifest of a conversion that was interrupted, or None."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    units = [
        Unit(u["file"], u["source"], [read_output(o) for o in u["outputs"]], u["digests"]) for u in value.pop("units")
    ]
    return Manifest(**value, units=units)


def read_output(value: dict[str, Any]) -> Output:
    return Output(Piece(**value["piece"]), value["dtype"], tuple(value["shape"]))


def check_same_source(manifest: Manifest, config: dict[str, Any], folder: Path, partial: Path) -> None:
    """Raise UserError if the interrupted conversion was of another source, or lost what it still needs."""
    present = {file: (folder / file).stat().st_size for file in manifest.source_sizes if (folder / file).exists()}
    changed = [file for file, size in present.items() if manifest.source_sizes[file] != size]
    if manifest.config != config or changed or differing_marks(manifest.source_marks, folder):
        raise UserError(
            f"{partial} holds an interrupted conversion of another checkpoint than {folder}. "
            f"Remove it to start again: rm -r {partial}"
        )
    lost = {unit.source for unit in manifest.units if not unit.is_done} - present.keys()
    if lost:
        raise UserError(
            f"{folder}: {len(lost)} weight files that are not converted yet are missing, first {min(lost)}. "
            "Run the download step again."
        )


def forget_lost_files(manifest: Manifest, partial: Path) -> None:
    """Mark units undone whose target file is gone or has another size."""
    for i, unit in enumerate(manifest.units):
        path = partial / unit.file
        if unit.is_done and not (path.exists() and path.stat().st_size > unit.size):
            manifest.units[i] = dataclasses.replace(unit, digests={})
