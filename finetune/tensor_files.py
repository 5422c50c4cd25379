"""Safetensors files without loading them: where each tensor lies, and a writer that holds one tensor at a time.

A file is 8 bytes with the header's length, the header as JSON (name -> dtype, shape, data_offsets), then the data.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# What other steps say of the folder that they made.
RECORDS = ("conversion.json", "download.json", "merge.json", "complete.json", "train_args.json", "train_report.json")


def copy_besides_weights(source: Path, target: Path, *but: str) -> None:
    """Config, tokenizer, chat template, licences: every file of a model that is no weights and no record, nor in `but`.

    The copies are readable for all.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in (*RECORDS, *but):
            shutil.copyfile(path, target / path.name)
            (target / path.name).chmod(0o644)


@dataclass(frozen=True)
class Place:
    """One stored tensor: its file, safetensors dtype name, shape, and the bytes it takes in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return self.end - self.start


def read_header(file: Path) -> dict[str, Place]:
    """Name -> place for every tensor of one file, in the file's order. Raises UserError on a torn or foreign file."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length < 200_000_000 else None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected a safetensors file, found {error}.") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: expected a safetensors file, found no header.")
    header.pop("__metadata__", None)
    places = {
        name: Place(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"]))
        for name, entry in header.items()
    }
    expected, found = max((p.end for p in places.values()), default=0), file.stat().st_size
    if expected > found:
        raise UserError(f"{file}: expected {expected:,} bytes, found {found:,}. Fetch or write the file again.")
    return dict(sorted(places.items(), key=lambda item: item[1].start))


def shard_files(model_dir: Path) -> list[Path]:
    """The checkpoint's safetensors files in order. Raises UserError when one is missing or there are none."""
    index = model_dir / INDEX
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (model_dir / SINGLE).exists():
        files = [SINGLE]
    else:
        raise UserError(f"{model_dir}: expected {SINGLE} or {INDEX}, found neither.")
    missing = [name for name in files if not (model_dir / name).exists()]
    if missing:
        raise UserError(f"{model_dir}: {len(missing)} of {len(files)} weight files are missing, first {missing[0]}.")
    return [model_dir / name for name in files]


def tensor_places(model_dir: Path) -> dict[str, Place]:
    """Name -> place over all the checkpoint's files."""
    return {name: place for file in shard_files(model_dir) for name, place in read_header(file).items()}


def write_shard(target: Path, places: dict[str, Place], tensors: Iterable[tuple[str, bytes | memoryview]]) -> None:
    """Write a file with the header of `places` (dtypes and shapes) from (name, data) pairs in that order.

    The data is taken one tensor at a time, so memory holds one. The file appears under its name when it is complete.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, place in places.items():
        entry = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [offset, offset + place.size]}
        header[name], offset = entry, offset + place.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    partial = target.with_name(target.name + ".partial")
    with open(partial, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, data), expected in zip(tensors, places, strict=True):
            if name != expected or len(data) != places[name].size:
                raise ValueError(f"{target}: {name} ({len(data)} bytes) where {expected} was planned")
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.chmod(0o644)
    partial.replace(target)
