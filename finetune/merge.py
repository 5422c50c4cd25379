"""Merge a LoRA adapter into its base model, file by file, and prove the result: used by `make qwen-merge`.

    SAVE_PATH.partial/   what is being written; an interrupted merge goes on from its finished files
    SAVE_PATH/           the merged model, renamed into place when it has been checked; merge.json was written last

Every tensor keeps the base's dtype: merge into the 16-bit model, also when the adapter was trained on its 4-bit form.
Memory holds one changed tensor (and its fp32 form) at a time.
"""

import json
import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.checkpoint.disk import check_free
from finetune.countdown import Countdown
from finetune.errors import UserError
from finetune.identity import ADAPTER_CONFIG, adapter_fingerprint, check_adapter, fingerprint
from finetune.json_files import read_json_object
from finetune.lora_weights import LoraWeights
from finetune.merge_check import check_merge
from finetune.models import check_model_dir
from finetune.tensor_files import copy_besides_weights, read_header, shard_files, tensor_places, write_shard
from finetune.text_files import write_aside

MARKER = "merge.json"
PLAN = "merge_plan.json"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_aside(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _tensor_bytes(file: Path, lora: LoraWeights) -> Iterator[tuple[str, Any]]:
    """(name, data) of every tensor of a base file after the merge; unchanged ones are views of the file itself."""
    import torch
    from safetensors import safe_open

    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as view, safe_open(file, framework="pt") as tensors:
            for name, place in read_header(file).items():
                if lora.touches(name):
                    merged = lora.apply(name, tensors.get_tensor(name)).contiguous()
                    yield name, memoryview(merged.view(-1).view(torch.uint8).numpy())
                else:
                    with view[place.start : place.end] as data:
                        yield name, data


def _open_partial(partial: Path, plan: dict[str, Any]) -> None:
    """Make the folder of the work in progress; what another merge left there is removed with a word."""
    try:
        found = _read_json(partial / PLAN)
    except ValueError:  # torn: what lies beside it may be anybody's
        found = None
    if partial.exists() and found != plan:
        print(f"{partial}: {'left by another merge' if found else 'without a readable plan'}, removed")
        shutil.rmtree(partial)
    if not partial.exists():
        _write_json(partial / PLAN, plan)


def _write_weights(files: list[Path], lora: LoraWeights, partial: Path) -> None:
    todo = [file for file in files if not _is_written(partial / file.name, file)]
    needed = sum(file.stat().st_size for file in todo)
    check_free(partial, needed, "the merged model", "Free some, or name a --save_path on a larger disk.")
    countdown = Countdown(len(files), done=len(files) - len(todo), unit="files")
    for file in todo:
        write_shard(partial / file.name, read_header(file), _tensor_bytes(file, lora))
        countdown.advance(1)


def _is_written(file: Path, base: Path) -> bool:
    """Whether a merged file is whole: all tensors of the base's, and their last byte."""
    if not file.exists():
        return False
    try:
        places, wanted = read_header(file), read_header(base)
    except UserError:  # torn
        return False
    return {name: one.shape for name, one in places.items()} == {name: one.shape for name, one in wanted.items()}


def write_merged(model_dir: Path, adapter_dir: Path, target: Path) -> None:
    """Write the merged checkpoint's files into an existing folder; weight files that are there already stay."""
    tied = bool((_read_json(model_dir / "config.json") or {}).get("tie_word_embeddings"))
    lora = LoraWeights(adapter_dir, tensor_places(model_dir), tied)
    _write_weights(shard_files(model_dir), lora, target)
    copy_besides_weights(model_dir, target)
    print(f"merged: {len(lora.updates)} updated and {len(lora.replacements)} replaced tensors")


def _is_done(save_path: Path, plan: dict[str, Any]) -> bool:
    """Whether this very merge lies there. Raises UserError when something else does."""
    if not save_path.exists() or (save_path.is_dir() and not any(save_path.iterdir())):
        return False
    if not (save_path / MARKER).exists():
        raise UserError(f"{save_path} exists and is no merged model. Remove it or name another --save_path.")
    marker = read_json_object(save_path / MARKER, "record of a merge", "")
    if any(marker.get(key) != plan[key] for key in plan):
        merged = " into ".join(str(marker.get(key)) for key in ("adapter_name_or_path", "model_name_or_path"))
        raise UserError(
            f"{save_path} holds the merge of {merged}, "
            "of other weights than now. Remove it or name another --save_path."
        )
    return True


def merge_adapter(model_name_or_path: str | Path, adapter_name_or_path: str | Path, save_path: str | Path) -> None:
    """Write the merged model to save_path; says so when it is there already.

    Raises UserError on an adapter of another base, one that has no exact merge, a full disk, a foreign folder at
    save_path, or a result whose logits differ from base + adapter.
    """
    model_dir, adapter_dir = check_model_dir(model_name_or_path), Path(adapter_name_or_path)
    save_path = Path(save_path).resolve()  # of a link: what is written beside it is then on the same disk
    if (save_path / ADAPTER_CONFIG).exists() or save_path == model_dir.resolve():
        raise UserError(f"--save_path {save_path}: expected a new folder, found the adapter's or the base model's.")
    check_adapter(adapter_dir, model_dir)
    plan = {"model_fingerprint": fingerprint(model_dir), "adapter_fingerprint": adapter_fingerprint(adapter_dir)}
    if _is_done(save_path, plan):
        print(f"already done: {save_path}")
        return
    partial = save_path.with_name(save_path.name + ".partial")
    _open_partial(partial, plan)
    write_merged(model_dir, adapter_dir, partial)
    check = check_merge(model_dir, adapter_dir, partial)
    names = {"model_name_or_path": str(model_dir), "adapter_name_or_path": str(adapter_dir)}
    _write_json(partial / MARKER, {**names, **plan, "check": check})
    (partial / PLAN).unlink()
    if save_path.exists():
        save_path.rmdir()  # empty, see _is_done
    partial.rename(save_path)
    print(f"written: {save_path}")
