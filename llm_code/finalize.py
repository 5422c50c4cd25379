"""Make final/ complete from any checkpoint of a training run, and check it: the walkthrough's copying by hand.

    python -m llm_code.finalize --model_name_or_path BASE --output_dir DIR [--checkpoint DIR/checkpoint-100]

Without --checkpoint the final/ that training wrote is checked, or where there is none the newest complete checkpoint is
taken. Writes DIR/final: weights in shards, config, tokenizer, template, generation config, licences, training
report. The weights are put together from DeepSpeed's states where the checkpoint has no others.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from finetune import saving
from finetune.errors import UserError, run_main
from finetune.models import check_model_dir

REPORTS = ("train_report.json", "loss.png")


def parse_arguments() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder of the base model that was trained")
    parser.add_argument("--output_dir", required=True, type=Path, help="output folder of the training")
    parser.add_argument("--checkpoint", type=Path, help="one of its checkpoints; default: final/, else the newest")
    return parser.parse_args()


def choose_checkpoint(output_dir: Path, checkpoint: Path | None) -> Path:
    """The checkpoint asked for, else the newest complete one. Raises UserError when it is not there or torn."""
    if checkpoint is None:
        newest, _ = saving.newest_checkpoint(output_dir)
        if newest is None:
            raise UserError(f"{output_dir} has no complete checkpoint. Train first: make baichuan-train")
        return newest
    if not saving.is_complete(checkpoint):
        found = ", ".join(path.name for _, path in saving.list_checkpoints(output_dir)) or "none"
        raise UserError(f"{checkpoint} is no complete checkpoint. In {output_dir} there are: {found}.")
    return checkpoint


def check_base(checkpoint: Path, base_dir: Path) -> None:
    """Raises UserError when the checkpoint was trained from other weights than those in base_dir."""
    from finetune.identity import fingerprint

    marker = saving.read_marker(checkpoint) or {}
    recorded = marker.get("identity", {}).get("base_model")
    if recorded and recorded != fingerprint(base_dir):
        name = marker.get("names", {}).get("base_model", "another model")
        raise UserError(f"{checkpoint} was trained from {name}, not from {base_dir}. Name that folder.")


def write_final(checkpoint: Path, base_dir: Path, output_dir: Path) -> Path:
    """Write OUTPUT_DIR/final from a checkpoint, aside first; what was there before is replaced.

    A training may be saving in the same output_dir: it has its own folder for what is half-written.
    """
    check_base(checkpoint, base_dir)
    work = saving.finalizing_dir(output_dir)
    shutil.rmtree(work, ignore_errors=True)
    weights = sum(path.stat().st_size for path in base_dir.glob("*.safetensors"))
    saving.check_disk(output_dir, 2 * weights)
    try:
        marker = _write_aside(checkpoint, base_dir, output_dir, work / "final")
        saving.publish(work / "final", output_dir / "final", marker)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output_dir / "final"


def _write_aside(checkpoint: Path, base_dir: Path, output_dir: Path, written: Path) -> dict[str, Any]:
    """All files of final/ but its marker, which is returned."""
    from finetune.final_model import complete

    written.mkdir(parents=True)
    try:
        copy_weights(checkpoint, base_dir, written)
    except FileNotFoundError:
        if saving.is_complete(checkpoint):
            raise
    # Training renames an old checkpoint before it removes it: while its marker is there, all was there.
    marker = saving.read_marker(checkpoint)
    if marker is None:
        raise UserError(f"{checkpoint} was removed while it was copied. Run it again for the newest one.")
    complete(written, base_dir, bool(marker.get("norm_head")))
    for path in (checkpoint / "train_args.json", *(output_dir / name for name in REPORTS)):
        if path.exists():
            shutil.copyfile(path, written / path.name)
    return marker


def copy_weights(checkpoint: Path, base_dir: Path, target: Path) -> None:
    """The checkpoint's safetensors files, or its DeepSpeed states put together in the base's dtype."""
    files = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.safetensors.index.json")]
    for path in files:
        shutil.copyfile(path, target / path.name)
    if not files:
        import json

        import torch

        from finetune.zero import weights_from_zero

        config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
        weights_from_zero(checkpoint, target, getattr(torch, config.get("dtype") or config["torch_dtype"]))


def newer_than(final: Path, output_dir: Path) -> str:
    """Words about final/, which an earlier update may have made than the newest checkpoint is of."""
    newest, _ = saving.newest_checkpoint(output_dir)
    update, later = ((saving.read_marker(folder) or {}).get("step") for folder in (final, newest or final))
    if update is None or later is None or later <= update:
        return ""
    return f", of update {update}. A newer checkpoint is there: --checkpoint {newest} makes it of update {later}"


def main() -> None:
    """Command line."""
    flags = parse_arguments()
    base_dir = check_model_dir(flags.model_name_or_path)
    final = flags.output_dir / "final"
    if flags.checkpoint is None and saving.is_complete(final):
        shutil.rmtree(saving.finalizing_dir(flags.output_dir), ignore_errors=True)  # of one that was killed
        print(f"already done: {final}{newer_than(final, flags.output_dir)}")
    else:
        checkpoint = choose_checkpoint(flags.output_dir, flags.checkpoint)
        print(f"written: {write_final(checkpoint, base_dir, flags.output_dir)} from {checkpoint}")
    from finetune.final_model import check_in_fresh_process

    print(f"checked: {check_in_fresh_process(final)}")


if __name__ == "__main__":
    run_main(main)
