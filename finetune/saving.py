"""Checkpoints on disk: written aside, marked complete last, renamed; the newest complete one is found again.

    OUTPUT_DIR/checkpoint-500/     one checkpoint, complete.json last
    OUTPUT_DIR/final/              the trained adapter or model, complete.json last
    OUTPUT_DIR/.saving/            what training is writing now; left behind only by a crash, removed by the next start
    OUTPUT_DIR/.finalizing/        the same of llm_code.finalize, which may run while a training saves

`complete.json` of a checkpoint names the run it belongs to (base model, data, rows of an update, ...), so that a
folder is never continued with another experiment by accident.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from finetune.checkpoint.manifest import sync
from finetune.errors import UserError

MARKER = "complete.json"
ASIDE = ".saving"
OLD = "old-"  # what a new folder takes the place of, while that is being renamed
FINALIZING = ".finalizing"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# How each part of a run's identity is called in a message.
WORDS = {
    "base_model": "base model",
    "train_data": "training data",
    "rows_per_update": "rows per update",
    "optim": "optimiser",
}
NO_FLAGS = ("base_model", "train_data", "rows_per_update")  # parts of the identity that several flags make up


def checkpoint_dir(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of an update lies."""
    return Path(output_dir) / f"checkpoint-{step}"


def aside_dir(output_dir: str | Path) -> Path:
    """Where training's checkpoints and final/ are while they are being written."""
    return Path(output_dir) / ASIDE


def finalizing_dir(output_dir: str | Path) -> Path:
    """Where final/ is while llm_code.finalize writes it: neither it nor training removes the other's work."""
    return Path(output_dir) / FINALIZING


def is_complete(folder: str | Path) -> bool:
    """Whether the folder was finished: its marker is there and readable."""
    return read_marker(folder) is not None


def read_marker(folder: str | Path) -> dict[str, Any] | None:
    """What was written when the folder was finished, or None."""
    try:
        return json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return None


def publish(written: str | Path, target: str | Path, record: dict[str, Any]) -> None:
    """Finish a folder written aside: flush its files, write the marker, rename it to `target`.

    What was there before goes aside first, whole: a removal that is interrupted must not leave a folder that looks
    complete.
    """
    written, target = Path(written), Path(target)
    for path in written.rglob("*"):
        if path.is_file():
            sync(path)
    marker = written / MARKER
    marker.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(marker)
    sync(written)
    old = written.with_name(f"{OLD}{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        _take_away(target, old)
    os.rename(written, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_aside(output_dir: str | Path) -> None:
    """Remove what a training that crashed left half-written; a folder that publish had taken aside goes back."""
    for old in aside_dir(output_dir).glob(f"{OLD}*"):
        target = Path(output_dir) / old.name.removeprefix(OLD)
        if is_complete(old) and not target.exists():
            os.rename(old, target)
    shutil.rmtree(aside_dir(output_dir), ignore_errors=True)


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(update, folder) of everything called a checkpoint, newest first, complete or not."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """(newest complete checkpoint or None, a remark for each newer one that is torn)."""
    remarks = []
    for _, path in list_checkpoints(output_dir):
        if is_complete(path):
            return path, remarks
        remarks.append(f"{path} is not complete (no readable {MARKER}): skipped")
    return None, remarks


def rotate(output_dir: str | Path, limit: int, best: str | Path | None = None) -> list[Path]:
    """Remove complete checkpoints beyond the `limit` newest, never the best, and torn ones. Returns what was removed.

    Call it after the newest one is complete. What never had a marker is somebody else's and stays.
    """
    checkpoints = [path for _, path in list_checkpoints(output_dir) if (path / MARKER).exists()]
    newest = [path for path in checkpoints if is_complete(path)][:limit]
    kept = {path.resolve() for path in newest} | ({Path(best).resolve()} if best else set())
    removed = [path for path in checkpoints if path.resolve() not in kept]
    for path in removed:
        _remove(path, aside_dir(output_dir))
    return removed


def _remove(path: Path, aside: Path) -> None:
    """A folder, or what a link leads to. Aside first: an interrupted removal must not leave a part of a checkpoint."""
    aside.mkdir(exist_ok=True)
    condemned, content = aside / f"removed-{path.name}", path.resolve()
    shutil.rmtree(condemned, ignore_errors=True)
    _take_away(path, condemned)
    if condemned.is_symlink():
        condemned.unlink()
        condemned = content
    shutil.rmtree(condemned, ignore_errors=True)


def _take_away(path: Path, aside: Path) -> None:
    """Rename, or remove where that cannot be: overlayfs moves no folder of a container's image.

    Then the marker says at once that the folder is torn, and goes last: without one it would be another program's.
    """
    try:
        return os.rename(path, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    (path / MARKER).write_text("")
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != MARKER:
            entry.unlink()
    shutil.rmtree(path, ignore_errors=True)


def check_nothing_foreign(output_dir: str | Path) -> None:
    """Raises UserError when output_dir holds a checkpoint or final/ of another program, which training would replace.

    A folder of this program is renamed into its place with its marker in it, so one without a marker is none.
    """
    folders = [path for _, path in list_checkpoints(output_dir)] + [Path(output_dir) / "final"]
    foreign = [path for path in folders if path.is_dir() and any(path.iterdir()) and not (path / MARKER).exists()]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UserError(
            f"{foreign[-1]}{more}: expected a folder that this program wrote, found no {MARKER} in it. Training would "
            "take its place: move it away, or name another --output_dir."
        )


def check_same_run(output_dir: str | Path, identity: dict[str, Any], names: dict[str, str]) -> None:
    """Raises UserError when a complete checkpoint or final/ of another experiment lies in output_dir.

    `names` are what a person calls those parts of the identity that are digests.
    """
    newest, _ = newest_checkpoint(output_dir)
    for folder in (newest, Path(output_dir) / "final"):
        marker = (read_marker(folder) or {}) if folder else {}
        there, there_names = marker.get("identity", {}), marker.get("names", {})
        different = {key: value for key, value in identity.items() if key in there and there[key] != value}
        if different:
            listed = "".join(
                f"  {WORDS.get(key, key)}: {there_names.get(key, there[key])} there, {names.get(key, value)} now\n"
                for key, value in different.items()
            )
            flags = " ".join(f"--{key} {there[key]}" for key in different if key not in NO_FLAGS)
            raise UserError(
                f"{folder} belongs to another experiment:\n{listed}"
                f"Set these back to go on with it{flags and f' ({flags})'}, or name another --output_dir "
                "(or remove the folder) to start anew."
            )


def check_same_stage(output_dir: str | Path, stage: str) -> None:
    """Raises UserError when the checkpoint to go on from was written by another DeepSpeed stage (`none`: without)."""
    newest, _ = newest_checkpoint(output_dir)
    there = (read_marker(newest) or {}).get("stage", stage) if newest else stage
    if there != stage:
        raise UserError(
            f"{newest} was written with DEEPSPEED_STAGE={there}, now it is {stage}: they keep the optimiser's state "
            f"differently. Set DEEPSPEED_STAGE={there} to go on, or name another --output_dir."
        )


def checkpoint_bytes(trainable_parameters: int, weight_bytes: int, optimizer_bytes: int) -> int:
    """Size of one checkpoint: weights that are trained and their optimiser state, and 20 MiB for the rest."""
    return trainable_parameters * (weight_bytes + optimizer_bytes) + 20 * 2**20


def disk_needed(one_checkpoint: int, one_final: int, limit: int, has_best: bool, existing: int = 0) -> int:
    """Bytes that must be free: `limit` checkpoints, one while it is written, the best, final/; less what is there.

    One at least: the next is written before older ones go.
    """
    return one_checkpoint * max(1, limit + 1 + int(has_best) - existing) + one_final


def existing_parent(path: Path) -> Path:
    """The path, or the folder above it that is there."""
    return path if path.exists() else existing_parent(path.parent)


def _size(number: float) -> str:
    """1.5 GiB, or 12 MiB below one: small runs are refused too, and 0.0 GiB says nothing."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _hidden(output_dir: str | Path) -> str:
    """A sentence for each hidden folder that holds something: `ls` does not show them."""
    text = ""
    for folder in (aside_dir(output_dir), finalizing_dir(output_dir)):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size:
            text += f" {folder} holds {_size(size)} half-written: remove it unless something is being written."
    return text


def free_bytes(output_dir: str | Path) -> int:
    """Bytes that are free where output_dir lies, or will lie."""
    return shutil.disk_usage(existing_parent(Path(output_dir).absolute())).free


def check_disk(output_dir: str | Path, needed: int) -> None:
    """Raises UserError when less than `needed` bytes are free where output_dir lies (or will lie)."""
    free = free_bytes(output_dir)
    if free < needed:
        raise UserError(
            f"{output_dir}: this run's checkpoints need {_size(needed)}, {_size(free)} are free.{_hidden(output_dir)} "
            "Free some disk, lower save_total_limit, or name an --output_dir on a larger disk."
        )


def free_host_memory() -> int | None:
    """Bytes of main memory that can be taken now, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return min(values["MemAvailable"], _container_limit())


def _container_limit(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a container's limit leaves (cgroup version 2), or a number larger than any memory.

    Pages of files count as used there, and are given back to whoever needs them.
    """
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(counters["active_file"]) + int(counters["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 2**63


def check_host_memory(needed: int, what: str) -> None:
    """Raises UserError when less than `needed` bytes of main memory are free."""
    free = free_host_memory()
    if free is not None and free < needed:
        raise UserError(
            f"{what} needs {_size(needed)} of main memory, {_size(free)} are free. "
            "End other programs or take a machine with more memory."
        )
