"""What must hold before a conversion is called finished: data on disk, names and shapes, sizes, token ids."""

import hashlib
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint.manifest import Manifest, Unit
from finetune.checkpoint.probe_texts import probe_texts
from finetune.errors import UserError
from finetune.tensor_files import read_header, tensor_places

CHUNK = 8_000_000


class VerificationError(UserError):
    """The written files are not what they should be: a broken disk or an unexpected library version."""


def check_file(path: Path, unit: Unit, digests: dict[str, str]) -> None:
    """Read a written file back from the disk and compare names, shapes and the digest of every tensor."""
    places = read_header(path)
    written = {name: (place.dtype, place.shape) for name, place in places.items()}
    if written != {output.piece.target: (output.dtype, output.shape) for output in unit.outputs}:
        raise VerificationError(f"{path}: the header read back is not the one written. Check the disk and run again.")
    with open(path, "rb") as stream:
        # Otherwise the page cache would answer, and the comparison would say nothing about the disk.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name, place in places.items():
            if digest_of(stream, place.start, place.size) != digests[name]:
                raise VerificationError(
                    f"{path}: {name} read back differs from what was written. Check the disk and run again."
                )


def digest_of(stream: Any, start: int, size: int) -> str:
    """sha256 of a stretch of a file."""
    digest = hashlib.sha256()
    stream.seek(start)
    while size > 0:
        block = stream.read(min(CHUNK, size))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def check_weights(work: Manifest, target: Path) -> int:
    """Compare the weight files with the plan and the model class; returns the number of parameters."""
    shapes = {name: place.shape for name, place in tensor_places(target).items()}
    check_against_class(shapes, target)
    check_bytes(work, target)
    return sum(math.prod(shape) for shape in shapes.values())


def check_against_class(shapes: dict[str, tuple[int, ...]], target: Path) -> None:
    """Compare names and shapes with those of the model class, built from config.json without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if differing:
        name = differing[0]
        raise VerificationError(
            f"{len(differing)} tensors differ from {type(model).__name__}, first {name}: "
            f"expected {expected.get(name)}, got {shapes.get(name)}."
        )


def check_bytes(work: Manifest, target: Path) -> None:
    """Compare the size of every file with the plan's."""
    for unit in work.units:
        stored = sum(place.size for place in read_header(target / unit.file).values())
        size = (target / unit.file).stat().st_size
        header = size - stored
        if stored != unit.size or not 0 < header < CHUNK:
            raise VerificationError(
                f"{target / unit.file}: expected {unit.size:,} bytes of tensors, found {stored:,} in {size:,}."
            )


def check_tokenizer(layout: ModuleType, source: Path, target: Path) -> int:
    """Compare the converted tokenizer's ids with the published one's on every probe text; returns their number.

    AutoTokenizer may rebuild parts of tokenizer.json by the rules of a class, other loaders take the file as it stands:
    both are checked.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    texts = probe_texts()
    expected = layout.tokenizer().reference_ids(source, texts)
    by_class, by_file = AutoTokenizer.from_pretrained(target), Tokenizer.from_file(str(target / "tokenizer.json"))
    for text, ids in zip(texts, expected, strict=True):
        for found in (by_class(text, add_special_tokens=False)["input_ids"], by_file.encode(text).ids):
            if found != ids:
                raise VerificationError(f"the converted tokenizer differs on {text!r}: expected {ids}, got {found}.")
    return len(texts)
