"""Brings files from a hub onto the disk: room for them first, progress meanwhile, sizes and checksums afterwards."""

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.checkpoint.disk import check_free, existing_parent
from finetune.checkpoint.job import print_progress as report
from finetune.checkpoint.layouts import download_record
from finetune.checkpoint.source import weight_files
from finetune.errors import UserError
from finetune.hub_files import problem_of, wrong_files
from finetune.hubs import Hub, RemoteFile


def check_place(folder: Path) -> None:
    """Raise UserError if the folder holds something that is not a checkpoint."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists() and not is_begun(folder):
        raise UserError(f"{folder} is not empty and holds no checkpoint. Name another folder.")


def check_no_other_model(folder: Path, listed: list[RemoteFile]) -> None:
    """Raise UserError if the folder holds weights that are neither the hub's nor of a download begun here."""
    if is_begun(folder) or not folder.exists():
        return
    on_hub = {file.path: file for file in listed}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin") and (path.name not in on_hub or problem_of(path, on_hub[path.name])):
            raise UserError(
                f"{folder} holds another model: {path.name} is not the hub's. Name another folder, or remove this one."
            )


def is_begun(folder: Path) -> bool:
    return download_record(folder) is not None


def check_space(
    folder: Path, model_dir: Path, files: list[RemoteFile], is_converted: bool, keep_original: bool
) -> None:
    """Raise UserError if what is still to be downloaded, and the conversion after it, do not fit on their disks."""
    weights = [file.size for file in files if file.path.endswith((".safetensors", ".bin"))]
    missing = sum(file.size for file in files) - bytes_present(folder, files)
    converted = 0 if not is_converted else sum(weights) if keep_original else max(weights)
    advice = "Free some, or set KEEP_ORIGINAL=0 in .env to remove originals as they are converted."
    purpose = "the download and its native form"
    if existing_parent(folder).stat().st_dev == existing_parent(model_dir).stat().st_dev:
        return check_free(folder, missing + converted, purpose, advice)
    check_free(folder, missing, "the download", "Free some.")
    check_free(model_dir, sum(weights) * is_converted, "the native form", "Free some.")


def bytes_present(folder: Path, files: list[RemoteFile]) -> int:
    """Bytes of the files that are there already, complete or in part."""
    parts = [path for file in files for path in folder.glob(f"{file.path}*")]
    # ModelScope's partial files lie beside the whole ones, Hugging Face's here under names that are hashes.
    parts += (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete")
    return sum(path.stat().st_size for path in set(parts) if path.is_file())


def fetch_checked(hub: Hub, model_id: str, revision: str, files: list[RemoteFile], folder: Path) -> None:
    """Fetch, compare with the listing, fetch again once what is wrong. Raises UserError if it stays wrong."""
    for _ in range(2):
        with progress_lines(folder, sum(file.size for file in files)):
            hub.fetch(model_id, revision, [file.path for file in files], folder)
        wrong = wrong_files(folder, files, report)
        if not wrong:
            return check_index(folder)
        for name, problem in wrong.items():
            report(f"{name}: {problem}; removed")
            (folder / name).unlink(missing_ok=True)
    name, problem = next(iter(wrong.items()))
    raise UserError(f"{len(wrong)} files are not what {hub.endpoint} lists, first {name}: {problem}. Run again later.")


@contextmanager
def progress_lines(folder: Path, total: int, seconds: float = 10) -> Iterator[None]:
    """Where stderr is a log: a line every few seconds in place of the hub libraries' bars, which a log cannot show."""
    stopped = threading.Event()

    def run() -> None:
        before = folder_bytes(folder)
        while not stopped.wait(seconds):
            now = folder_bytes(folder)
            report(f"{now / 1e9:.1f} of {total / 1e9:.1f} GB downloaded, {(now - before) / 1e6 / seconds:.0f} MB/s")
            before = now

    if not sys.stderr.isatty():
        threading.Thread(target=run, daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below folder; those that vanish meanwhile don't count."""
    sizes = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


def check_index(folder: Path) -> None:
    """Raise UserError if the index names a file that the hub does not have."""
    lost = [name for name in weight_files(folder) if not (folder / name).exists()]
    if lost:
        raise UserError(f"the repository is incomplete on the hub: its index names {lost[0]}, which is not there.")


def tidy(folder: Path) -> None:
    """Remove the hub libraries' bookkeeping and make every file readable for a server under another user."""
    shutil.rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
    with suppress(OSError):
        (folder / ".cache").rmdir()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)
