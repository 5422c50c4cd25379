"""Writes the target's weight files one after another, verified on disk, removing source files on the way if asked."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.checkpoint import manifest, verify
from finetune.checkpoint.disk import gigabytes
from finetune.checkpoint.job import Job
from finetune.checkpoint.manifest import Manifest, Output, Unit
from finetune.checkpoint.pieces import Piece
from finetune.checkpoint.source import open_tensors
from finetune.tensor_files import Place, write_shard

NORM_EPS = 1e-12  # F.normalize's default, which the published NormHead uses
ROWS_AT_ONCE = 8192


def write_units(job: Job, work: Manifest) -> None:
    """Write, verify and record every unit that is not done; remove source files nothing needs any more."""
    total, done = sum(u.size for u in work.units), sum(u.size for u in work.units if u.is_done)
    started, done_before = time.monotonic(), done
    for unit in work.units:
        if not unit.is_done:
            unit.digests = write_unit(unit, job.source, job.partial)
            manifest.save(work, job.partial)
            done += unit.size
            seconds = (total - done) * (time.monotonic() - started) / (done - done_before)
            job.report(f"{unit.file}: {gigabytes(done)} of {gigabytes(total)} converted, {seconds:.0f} s to go")
        if not job.keep_original and all(u.is_done for u in work.units if u.source == unit.source):
            (job.source / unit.source).unlink(missing_ok=True)


def write_unit(unit: Unit, source: Path, partial: Path) -> dict[str, str]:
    """Write one target file and read it back from the disk; returns tensor -> sha256 of its data."""
    path = partial / unit.file
    places = {o.piece.target: Place(path, o.dtype, o.shape, 0, o.size) for o in unit.outputs}
    digests: dict[str, str] = {}
    with open_tensors(source / unit.source) as tensors:
        write_shard(path, places, converted(unit.outputs, tensors, digests))
    manifest.sync(partial)
    verify.check_file(path, unit, digests)
    return digests


def converted(
    outputs: list[Output], tensors: Mapping[str, Any], digests: dict[str, str]
) -> Iterator[tuple[str, memoryview]]:
    """(name, data) of each output in turn; fills digests."""
    import torch

    for output in outputs:
        rows = piece_rows(output.piece, tensors[output.piece.source])
        data = memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy())
        digests[output.piece.target] = hashlib.sha256(data).hexdigest()
        yield output.piece.target, data


def piece_rows(piece: Piece, tensor: Any) -> Any:
    """The rows of the piece, a view of the source unless they are normalised."""
    rows = tensor[piece.start : piece.stop]
    return normalized(rows) if piece.normalize_rows else rows


def normalized(rows: Any) -> Any:
    """Each row divided by its L2 norm, computed in float32 a few thousand rows at a time, in the source's dtype."""
    import torch

    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE].float()
        result[start : start + ROWS_AT_ONCE] = torch.nn.functional.normalize(part, dim=-1, eps=NORM_EPS)
    return result
