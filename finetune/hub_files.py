"""Which files of a repository a download takes, and whether what lies on the disk is what the hub lists."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from finetune.checkpoint.notices import LICENCE_WORDS
from finetune.checkpoint.source import FORMATS
from finetune.errors import UserError
from finetune.hubs import RemoteFile

SMALL_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
CHUNK = 8_000_000


def needed_files(files: list[RemoteFile]) -> list[RemoteFile]:
    """The weights in one format, safetensors before .bin, and the small files a loader or a lawyer reads.

    Left out: other weight formats, onnx, gguf, pictures, folders, and the model's own code, which is not run here.
    """
    top = [file for file in files if "/" not in file.path]
    weights = weights_of(top)
    indexes = {f"{stem}{suffix}.index.json" for stem, suffix in FORMATS}
    small = [
        file
        for file in top
        if (file.path.endswith(SMALL_SUFFIXES) and file.path not in indexes)
        or any(word in file.path.lower() for word in LICENCE_WORDS)
    ]
    return sorted({*small, *weights}, key=lambda file: file.path)


def weights_of(files: list[RemoteFile]) -> list[RemoteFile]:
    """Weight files of the preferred format and their index. Raises UserError if there are none."""
    for stem, suffix in FORMATS:
        weights = [file for file in files if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\{suffix}", file.path)]
        if weights:
            return weights + [file for file in files if file.path == f"{stem}{suffix}.index.json"]
    raise UserError(
        "the repository has no weights: expected model*.safetensors or pytorch_model*.bin. Check the model id."
    )


def wrong_files(folder: Path, files: list[RemoteFile], report: Callable[[str], None]) -> dict[str, str]:
    """Name -> what is wrong, for every file that is missing or not what the hub lists."""
    total, done, wrong = sum(file.size for file in files), 0, {}
    for file in files:
        problem = problem_of(folder / file.path, file)
        if problem:
            wrong[file.path] = problem
        done += file.size
        if file.size > 1e9:
            report(f"checked {file.path}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")
    return wrong


def problem_of(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with a local file, or None."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != file.size:
        return f"{size:,} bytes, the hub lists {file.size:,}"
    for expected, digest in ((file.sha256, hashlib.sha256()), (file.git_sha1, git_digest(size))):
        if expected and digest_of(path, digest) != expected:
            return f"{digest.name} is not {expected[:16]}..., which the hub lists"
    return None


def git_digest(size: int) -> "hashlib._Hash":
    """sha1 as git counts it for a blob."""
    return hashlib.sha1(b"blob %d\0" % size)


def digest_of(path: Path, digest: "hashlib._Hash") -> str:
    """Feed a file to the digest; its hexadecimal form."""
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
