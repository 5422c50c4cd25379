"""Free disk space: what a conversion will need at its highest point, and the check before it starts."""

import shutil
from pathlib import Path

from finetune.checkpoint.manifest import Manifest
from finetune.errors import UserError

RESERVE_BYTES = 100_000_000  # headers, tokenizer, and room for the log of the run


def peak_bytes(manifest: Manifest, keep_original: bool, same_filesystem: bool) -> int:
    """Bytes still to be written at the worst moment, source files counted as freed once all their pieces are done."""
    used = peak = 0
    for i, unit in enumerate(manifest.units):
        if not unit.is_done:
            used += unit.size
            peak = max(peak, used)
        is_last = all(later.source != unit.source for later in manifest.units[i + 1 :])
        if is_last and not keep_original and same_filesystem:
            used -= manifest.source_sizes[unit.source]
    return peak


def check_free(folder: Path, needed: int, purpose: str, advice: str) -> None:
    """Raise UserError unless the disk of folder, or of its nearest existing parent, has `needed` bytes and a rest."""
    place = existing_parent(folder)
    free = shutil.disk_usage(place).free
    if free < needed + RESERVE_BYTES:
        raise UserError(
            f"not enough disk for {purpose}: expected {gigabytes(needed + RESERVE_BYTES)} free at {place}, "
            f"found {gigabytes(free)}. {advice}"
        )


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def gigabytes(size: float) -> str:
    """Bytes as GB (10^9), with enough digits for a tiny model too."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.4f} GB"
