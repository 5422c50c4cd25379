"""What remains of a run: loss.png and train_report.json in its output folder, rewritten whenever it ends."""

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.pictures import find_cjk_font, picture
from finetune.text_files import write_aside

if TYPE_CHECKING:
    from finetune.progress import Meter

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "liger-kernel", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training uses, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: str | Path = ".") -> str | None:
    """The commit the code was run from, `-dirty` behind it with changes, or None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Readable JSON, whole or not at all."""
    write_aside(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def run_numbers(progress: Any, meter: "Meter", step: int, last_step: int) -> dict[str, Any]:
    """Seconds, tokens, speed, memory and cost of a run over all its starts."""
    seconds = progress.seconds
    return {
        "updates": step,
        "updates_planned": last_step,
        "starts": progress.starts,
        "seconds": round(seconds, 1),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "tokens_per_second": round(progress.tokens / seconds, 1) if seconds else None,
        "peak_memory_gib": round(progress.peak_memory_bytes / 2**30, 2) or None,
        "cost": round(meter.cost(seconds), 2),
    }


def draw_losses(history: Sequence[dict[str, float]], path: str | Path, title: str) -> None:
    """loss.png: training loss over updates, the evaluation loss where measured, the learning rate below."""
    font = None if title.isascii() else find_cjk_font()
    with picture(path, (8, 5.5), font) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                top.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        rates = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
        if rates:
            bottom.plot(*zip(*rates, strict=True), color="tab:gray")
        # Without a Chinese font each character would be an empty box, and a warning in the log.
        shown = title if font else title.encode("ascii", "replace").decode()
        top.set(title=shown, ylabel="loss per supervised token")
        bottom.set(xlabel="update", ylabel="learning rate")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
        if top.lines:
            top.legend()
