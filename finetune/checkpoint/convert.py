"""Carries a conversion out: file by file, verified on disk, resumable, with the source removed on the way if asked."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint import disk, manifest, notices, verify
from finetune.checkpoint.layouts import MARKER, detect_layout, finished_conversion, read_config
from finetune.checkpoint.manifest import Manifest, Output, Unit
from finetune.checkpoint.pieces import Piece
from finetune.checkpoint.source import DTYPES, open_tensors, read_headers
from finetune.errors import UserError

Report = Callable[[str], None]
NORM_EPS = 1e-12  # F.normalize's default, which the published NormHead uses
ROWS_AT_ONCE = 8192


def print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def convert_checkpoint(
    source: str | Path, target: str | Path, keep_original: bool = True, report: Report = print_progress
) -> Path:
    """Convert source into target and return the folder to load: target, or source itself when it is native already.

    Raises UserError if the source cannot be converted exactly, the disk is too small, or target holds something else.
    """
    source, target = Path(source), Path(target)
    config = read_config(source)
    layout = detect_layout(config)
    if layout is None:
        report(f"{source} is native already ({config['model_type']}): nothing to convert, use it as it stands")
        return source
    marker = finished_conversion(target)
    if marker is not None:
        check_same_target(marker, config, target)
        report(f"already done: {target} ({marker['num_parameters']:,} parameters, converted from {marker['source']})")
        return target
    if target.exists() and any(target.iterdir()):
        raise UserError(
            f"{target} is not empty and holds no finished conversion. Name another folder or empty this one."
        )
    partial = target.with_name(target.name + ".partial")
    work = prepare(layout, config, source, partial, keep_original, report)
    write_units(work, source, partial, keep_original, report)
    finish(layout, config, work, source, partial, target, report)
    return target


def check_same_target(marker: dict[str, Any], config: dict[str, Any], target: Path) -> None:
    """Raise UserError if target was converted from a different configuration."""
    if marker["source_config"] != config:
        raise UserError(
            f"{target} holds the conversion of another checkpoint ({marker['source']}). "
            "Name another folder, or remove it."
        )


def prepare(
    layout: ModuleType, config: dict[str, Any], source: Path, partial: Path, keep_original: bool, report: Report
) -> Manifest:
    """The plan: the saved one of an interrupted run, or a new one; the disk is checked for what is left of it."""
    work = manifest.load(partial)
    if work is None:
        work = manifest.plan(layout, config, source, read_headers(source))
    else:
        manifest.forget_lost_files(work, partial)
        manifest.check_same_source(work, config, source, partial)
        report(
            f"continuing: {sum(u.is_done for u in work.units)} of {len(work.units)} files are converted and verified"
        )
    same_filesystem = source.stat().st_dev == disk.existing_parent(partial).stat().st_dev
    needed = disk.peak_bytes(work, keep_original, same_filesystem)
    advice = "Free some, or set KEEP_ORIGINAL=0 to remove each source file once its tensors are verified."
    disk.check_free(partial, needed, f"converting {source}", advice if keep_original else "Free some.")
    partial.mkdir(parents=True, exist_ok=True)
    manifest.save(work, partial)
    return work


def write_units(work: Manifest, source: Path, partial: Path, keep_original: bool, report: Report) -> None:
    """Write, verify and record every unit that is not done; remove source files nothing needs any more."""
    total, done = sum(u.size for u in work.units), sum(u.size for u in work.units if u.is_done)
    started, done_before = time.monotonic(), done
    for unit in work.units:
        if not unit.is_done:
            unit.digests = write_unit(unit, source, partial)
            manifest.save(work, partial)
            done += unit.size
            seconds = (total - done) * (time.monotonic() - started) / (done - done_before)
            report(f"{unit.file}: {done / 1e9:.2f} of {total / 1e9:.2f} GB converted, {seconds:.0f} s to go")
        if not keep_original and all(u.is_done for u in work.units if u.source == unit.source):
            (source / unit.source).unlink(missing_ok=True)


def write_unit(unit: Unit, source: Path, partial: Path) -> dict[str, str]:
    """Write one target file and read it back from the disk; returns tensor -> sha256 of its data."""
    from finetune.tensor_files import Place, write_shard

    path = partial / unit.file
    places = {o.piece.target: Place(path, o.dtype, o.shape, 0, o.size) for o in unit.outputs}
    digests: dict[str, str] = {}
    with open_tensors(source / unit.source) as tensors:
        write_shard(path, places, converted(unit.outputs, tensors, digests))
    manifest.sync_folder(partial)
    verify.check_file(path, unit, digests)
    return digests


def converted(outputs: list[Output], tensors: Any, digests: dict[str, str]) -> Iterator[tuple[str, memoryview]]:
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


def finish(
    layout: ModuleType,
    config: dict[str, Any],
    work: Manifest,
    source: Path,
    partial: Path,
    target: Path,
    report: Report,
) -> None:
    """Write everything but the weights, verify the whole, write the marker, and give the folder its name."""
    from finetune.checkpoint.small_files import write_index, write_json, write_small_files

    write_index(work, partial)
    write_small_files(layout, config, main_dtype(work), source, partial)
    notices.write_notices(layout, source, partial)
    facts = verify.check_checkpoint(layout, work, source, partial, report)
    for path in partial.iterdir():
        path.chmod(0o644)
    marker = verify.marker(layout, config, work, source) | facts
    write_json(partial / (MARKER + ".tmp"), marker)
    (partial / (MARKER + ".tmp")).rename(partial / MARKER)
    manifest.sync_folder(partial)
    os.rename(partial, target)
    manifest.sync_folder(target.parent)
    (target / manifest.MANIFEST).unlink()  # last: until here a restart needs it when source files are gone
    report(f"converted {source} -> {target}: {facts['num_parameters']:,} parameters, {layout.ARCHITECTURE}")


def main_dtype(work: Manifest) -> str:
    """torch name of the dtype that most bytes have."""
    sizes: dict[str, int] = {}
    for output in (o for unit in work.units for o in unit.outputs):
        sizes[output.dtype] = sizes.get(output.dtype, 0) + output.size
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])][1]
