"""Is a checkpoint that training is about to go on from whole? One that was copied may lack files or end early."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from finetune.errors import UserError
from finetune.saving import newest_checkpoint, read_marker
from finetune.zero import step_folder


def check_undamaged(output_dir: Path, stage: str) -> None:
    """Raises UserError where files of the newest checkpoint are missing or cut short, before a model is loaded.

    `stage` of DeepSpeed. An earlier checkpoint is not taken instead: which of them to give up is the person's choice.
    """
    checkpoint, _ = newest_checkpoint(output_dir)
    if checkpoint is None:
        return
    for path in _files(checkpoint, stage, read_marker(checkpoint)):
        if problem := _problem(path):
            raise UserError(
                f"{path} {problem}: {checkpoint} is damaged. Copy it again, or remove the folder to go on from an "
                "earlier one."
            )


def _files(checkpoint: Path, stage: str, marker: dict[str, Any]) -> Iterator[Path]:
    """What training reads, whether it is there or not."""
    yield from (checkpoint / name for name in ("trainer_state.json", "scheduler.pt"))
    weights = sorted(checkpoint.glob("*.safetensors"))
    if stage == "none":
        yield from weights or [checkpoint / "*.safetensors"]
        yield checkpoint / "optimizer.pt"
        return
    step = step_folder(checkpoint)
    yield from weights
    yield from sorted(step.glob("*_model_states.pt")) or [step / "*_model_states.pt"]
    states = sorted(step.glob("*_optim_states.pt"))
    yield from states
    ranks = {int(match[1]) for path in states if (match := re.search(r"pp_rank_(\d+)", path.name))}
    for rank in sorted({*range(marker.get("ranks", 1))} - ranks):
        yield step / f"*_pp_rank_{rank}_*_optim_states.pt"


def _problem(path: Path) -> str:
    """What is wrong with a file, empty where nothing is."""
    if not path.exists():
        return "is missing"
    if path.suffix == ".pt":
        return "" if is_zipfile(path) else "is cut short"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np"):
                return ""
        except (SafetensorError, OSError) as error:
            return f"cannot be read ({error})"
    return ""
