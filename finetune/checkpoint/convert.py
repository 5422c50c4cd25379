"""A conversion from start to end: checks, small files, weights, verification, marker. Every step can be repeated."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.checkpoint import disk, manifest, verify
from finetune.checkpoint.job import Job, only_one, print_progress
from finetune.checkpoint.layouts import MARKER, detect_layout, finished_conversion, read_config
from finetune.checkpoint.manifest import Manifest
from finetune.checkpoint.notices import write_notices
from finetune.checkpoint.small_files import write_json, write_small_files
from finetune.checkpoint.source import read_headers
from finetune.checkpoint.weights import write_units
from finetune.errors import UserError


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    keep_original: bool = True,
    report: Callable[[str], None] = print_progress,
) -> Path:
    """Convert source into target and return the folder to load: target, or source itself when it is native already.

    Raises UserError if the source cannot be converted exactly, the disk is too small, or target holds something else.
    """
    source, target = Path(source), Path(target).resolve()
    config = read_config(source)
    layout = detect_layout(config)
    if layout is None:
        report(f"{source} is native already ({config['model_type']}): nothing to convert, use it as it stands")
        return source
    job = Job(layout, config, source, target, keep_original, report)
    if is_done(job):
        return target
    with only_one(source):
        try:
            work = prepare(job)
            write_units(job, work)
            finish(job, work)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"the disk of {job.partial} is full. Free some and run again: it goes on.") from error
    return target


def is_done(job: Job) -> bool:
    """Whether target is this conversion, finished. Raises UserError if it holds anything else."""
    marker = finished_conversion(job.target)
    if marker is None:
        check_target_free(job.target)
        return False
    if marker["source_config"] != job.config or manifest.differing_marks(marker.get("source_marks", {}), job.source):
        raise UserError(
            f"{job.target} holds the conversion of another checkpoint ({marker['source']}). "
            "Name another folder, or remove it."
        )
    parameters = marker["num_parameters"]
    job.report(f"already done: {job.target} ({parameters:,} parameters, converted from {marker['source']})")
    return True


def check_target_free(target: Path) -> None:
    """Raise UserError unless target can be made by renaming a folder to it."""
    if os.path.ismount(target) or (target.exists() and any(target.iterdir())):
        raise UserError(f"{target} is not empty and holds no finished conversion. Name another folder, or empty it.")


def prepare(job: Job) -> Manifest:
    """The plan, saved, with all but the weights written and checked: what can fail fails before the long part."""
    work = manifest.load(job.partial)
    if work is None:
        work = manifest.plan(job.layout, job.config, job.source, read_headers(job.source))
    else:
        manifest.forget_lost_files(work, job.partial)
        manifest.check_same_source(work, job.config, job.source, job.partial)
        done = sum(unit.is_done for unit in work.units)
        job.report(f"continuing: {done} of {len(work.units)} files are converted and verified")
    check_disk(job, work)
    token_ids = job.layout.tokenizer().token_ids(job.source)
    job.partial.mkdir(parents=True, exist_ok=True)
    write_small_files(job, work, token_ids)
    write_notices(job.layout, job.source, job.partial)
    verify.check_against_class(manifest.planned_shapes(work), job.partial)
    num_texts = verify.check_tokenizer(job.layout, job.source, job.partial)
    job.report(f"verified: the tokenizer gives the published ids on {num_texts} texts")
    manifest.save(work, job.partial)
    return work


def check_disk(job: Job, work: Manifest) -> None:
    """Raise UserError if what is left of the plan does not fit."""
    same_filesystem = job.source.stat().st_dev == disk.existing_parent(job.partial).stat().st_dev
    needed = disk.peak_bytes(work, job.keep_original, same_filesystem)
    advice = "Free some, or set KEEP_ORIGINAL=0 to remove each source file once its tensors are verified."
    disk.check_free(job.partial, needed, f"converting {job.source}", advice if job.keep_original else "Free some.")


def finish(job: Job, work: Manifest) -> None:
    """Verify the weights as a whole, write the marker, and give the folder its name."""
    num_parameters = verify.check_weights(work, job.partial)
    write_json(job.partial / MARKER, marker(job, work) | {"num_parameters": num_parameters})
    for path in job.partial.iterdir():
        path.chmod(0o644)
        manifest.sync(path)
    manifest.sync(job.partial)
    os.rename(job.partial, job.target)
    manifest.sync(job.target.parent)
    (job.target / manifest.MANIFEST).unlink()  # last: until here a restart needs it when source files are gone
    job.report(f"converted {job.source} -> {job.target}: {num_parameters:,} parameters, {job.layout.ARCHITECTURE}")


def marker(job: Job, work: Manifest) -> dict[str, Any]:
    """What conversion.json says: the source, the layout, and what training has to know about the model."""
    import transformers

    from finetune.checkpoint.layouts import download_record

    return {
        "format": 1,
        "layout": job.layout.NAME,
        "architecture": job.layout.ARCHITECTURE,
        "norm_head": job.layout.NORM_HEAD,
        "source": job.source.name,
        "download": download_record(job.source),
        "source_config": job.config,
        "source_marks": work.source_marks,
        "files": {unit.file: unit.digests for unit in work.units},
        "transformers": transformers.__version__,
    }
