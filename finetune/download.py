"""Download a model from a hub, check every file, and make it a native checkpoint: the steps behind two make targets.

Reads config.json first to learn the layout. A native model lands in model_dir; a Qwen-1 or Baichuan2-7B one lands in
download_dir/<model id> and is converted into model_dir. Stopped at any point it goes on when started again; finished
it says so without asking the network. `download.json` marks a complete download, `conversion.json` a conversion.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.checkpoint.job import print_progress as report
from finetune.errors import UserError


@dataclass(frozen=True)
class Wish:
    """What to download, and where to."""

    source: str
    model_id: str
    revision: str
    download_dir: Path
    model_dir: Path
    keep_original: bool

    @property
    def record(self) -> dict[str, str]:
        """What marks a folder as this download's."""
        return {"source": self.source, "model_id": self.model_id, "revision": self.revision}


def parse_arguments(description: str) -> Wish:
    """The command line that both projects' download programs share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True, help="owner/name on the hub")
    parser.add_argument("--revision", required=True, help="tag, branch or commit")
    parser.add_argument("--source", choices=("modelscope", "huggingface"), default="modelscope", help="which hub")
    parser.add_argument("--download_dir", required=True, type=Path, help="the original lands in download_dir/model_id")
    parser.add_argument("--model_dir", required=True, type=Path, help="folder of the native checkpoint")
    parser.add_argument(
        "--keep_original",
        type=int,
        choices=(0, 1),
        default=1,
        help="0 removes each original weight file once its tensors are verified in model_dir (default 1)",
    )
    args = parser.parse_args()
    return Wish(**(vars(args) | {"keep_original": bool(args.keep_original)}))


def download_model(wish: Wish) -> Path:
    """Bring the native checkpoint into wish.model_dir and return it. Raises UserError with one line for the person."""
    from finetune.checkpoint.convert import convert_checkpoint

    if is_finished(wish):
        report(f"already done: {wish.model_dir} holds {wish.model_id} {wish.revision}")
        return wish.model_dir
    original = wish.download_dir / wish.model_id
    if is_complete(original, wish):
        report(f"{original} is downloaded and checked")
    else:
        layout = fetch_model(wish, original)
        if layout is None:
            report(f"{wish.model_id} is native already: downloaded into {wish.model_dir}, nothing to convert")
            return wish.model_dir
    return convert_checkpoint(original, wish.model_dir, wish.keep_original)


def is_finished(wish: Wish) -> bool:
    """Whether model_dir holds this model. Raises UserError if it holds another one."""
    from finetune.checkpoint.layouts import MARKER, download_record, read_json

    record = download_record(wish.model_dir)  # before the conversion's: what was downloaded may itself be a conversion
    marker = wish.model_dir / MARKER
    if record is None and marker.exists():
        record = read_json(marker, "it marks a finished conversion").get("download")
        if record is None:
            raise UserError(
                f"{wish.model_dir} holds a conversion that was not downloaded by this step. If it is the model you "
                "want, nothing is left to do; otherwise name another folder."
            )
    if record is None:
        return False
    there = {key: record.get(key) for key in wish.record}
    if record["complete"] and there | {"source": wish.source} == wish.record != there:
        raise UserError(
            f"{wish.model_dir} holds this model from {record['source']}, wanted {wish.source}. If it is as good, "
            f"nothing is left to do (SOURCE={record['source']} in .env keeps it so); otherwise remove this folder."
        )
    if there != wish.record:
        raise UserError(
            f"{wish.model_dir} holds {record['model_id']} {record['revision']} from {record['source']}, wanted "
            f"{wish.model_id} {wish.revision} from {wish.source}. Name another folder, or remove this one."
        )
    return record["complete"]


def is_complete(folder: Path, wish: Wish) -> bool:
    """Whether folder holds this download, checked. Raises UserError if it holds (part of) another revision."""
    from finetune.checkpoint.layouts import download_record

    record = download_record(folder)
    if record is None:
        return False
    if {key: record.get(key) for key in wish.record} != wish.record:
        raise UserError(
            f"{folder} holds {record['revision']} from {record['source']}, wanted {wish.revision} from {wish.source}. "
            f"Remove it first: rm -r {folder}"
        )
    return record["complete"] and not lost_weights(folder, wish)


def lost_weights(folder: Path, wish: Wish) -> set[str]:
    """Weight files that are gone though still needed; a conversion under way has removed others itself."""
    from finetune.checkpoint import manifest
    from finetune.checkpoint.source import weight_files

    target = wish.model_dir.resolve()  # as the conversion does: the folder may be a link
    partial = target.with_name(target.name + ".partial")
    work = manifest.load(partial)
    if work is not None:
        manifest.forget_lost_files(work, partial)
    needed = weight_files(folder) if work is None else {unit.source for unit in work.units if not unit.is_done}
    return {name for name in needed if not (folder / name).exists()}


def fetch_model(wish: Wish, original: Path) -> ModuleType | None:
    """Download and check the files; returns the legacy layout, or None for a native model (then in model_dir)."""
    from finetune.checkpoint.convert import check_target_free
    from finetune.hub_files import needed_files
    from finetune.hubs import HUBS, explained
    from finetune.transfer import check_no_other_model, check_place, check_space, fetch_checked, tidy

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub = HUBS[wish.source]()
    report(f"-----> {hub.endpoint}: {wish.model_id} {wish.revision}")
    with explained(hub, wish.model_id, wish.revision):
        listed = hub.list_files(wish.model_id, wish.revision)
        layout = layout_of(hub, wish, listed)
        files = needed_files(listed)
        folder = wish.model_dir if layout is None else original
        check_place(folder)
        if layout is None:
            check_no_other_model(folder, listed)
        else:
            check_target_free(wish.model_dir)
            _check_two_folders(wish, original)
        check_space(folder, wish.model_dir, files, layout is not None, wish.keep_original)
        write_record(folder, wish, complete=False)
        fetch_checked(hub, wish.model_id, wish.revision, files, folder)
    tidy(folder)
    write_record(folder, wish, complete=True)
    return layout


def _check_two_folders(wish: Wish, original: Path) -> None:
    if original.resolve() == wish.model_dir.resolve():
        raise UserError(
            f"{wish.model_dir} would hold the original and the converted model. Name another folder for the converted "
            "one (QWEN_MODEL_DIR, BAICHUAN_MODEL_DIR)."
        )


def layout_of(hub: Any, wish: Wish, listed: list[Any]) -> ModuleType | None:
    """Fetch config.json alone and look at it: a model that cannot be used is refused before the long part."""
    from finetune.checkpoint.layouts import detect_layout, read_config

    if not any(file.path == "config.json" for file in listed):
        raise UserError(
            f"{wish.model_id} {wish.revision} has no config.json on {hub.endpoint}: expected a model's repository."
        )
    with tempfile.TemporaryDirectory() as folder:
        hub.fetch(wish.model_id, wish.revision, ["config.json"], Path(folder))
        return detect_layout(read_config(Path(folder)))


def write_record(folder: Path, wish: Wish, complete: bool) -> None:
    """Write download.json."""
    from finetune.checkpoint.layouts import DOWNLOAD_MARKER
    from finetune.checkpoint.small_files import write_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in its place, or nobody may write there
        keys = "BASE_MODEL_DIR, QWEN_MODEL_DIR, BAICHUAN_MODEL_DIR"
        raise UserError(f"{error.filename}: {error.strerror}. Name a folder you may write to ({keys}).") from error
    write_json(folder / DOWNLOAD_MARKER, wish.record | {"complete": complete})
