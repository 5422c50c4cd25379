"""The results of benchmarks.masters as a Markdown page and a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finetune.pictures import picture
from finetune.tables import markdown_table, percent

REFERENCES = ("masters", "float32")  # what the others are held against, the picture's first
NAMES = {
    "masters": "fp32 masters (DeepSpeed stage 1)",
    "copy": "their bf16 copy",
    "stochastic": "bf16, stochastic rounding (ours)",
    "nearest": "bf16, rounding to nearest",
    "float32": "fp32 throughout",
}
LAST = 50  # updates whose mean is compared
SMOOTHED = 10  # updates a point of the picture's upper half stands for


def references_of(runs: dict[str, Any]) -> list[str]:
    """Names of the runs that the others are held against."""
    return [name for name in REFERENCES if name in runs]


def differences(runs: dict[str, Any], name: str, reference: str) -> list[float]:
    """Loss of each update less the reference's."""
    return [one - other for one, other in zip(runs[name]["losses"], runs[reference]["losses"], strict=True)]


def page(found: dict[str, Any]) -> str:
    """Markdown: where it was measured, losses, weights."""
    runs, references = found["runs"], references_of(found["runs"])
    one = runs[references[0]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = f"{found['rows_per_update']} rows of at most {found['tokens_per_row']} tokens"
    against = [
        text
        for name in references
        for text in (f"less {NAMES[name]}: mean of these, 95 % interval", "at most, of all updates")
    ]
    loss_header = ("run", f"training loss, last {min(LAST, len(one['losses']))} updates", *against, "s an update")
    along = [f"of the way of {NAMES[name]}" for name in references]
    weight_header = ("weights", "norm of w - w0", *along, "numbers changed", "held-out loss", "its fall")
    return "\n".join(
        [
            f"{found['date']}, {found['machine']}. {versions}. Commit {found['git_commit']}.",
            "",
            f"{len(one['losses'])} updates of {rows} ({one['tokens_per_update']} an update), learning rate "
            f"{one['learning_rate']:g}, constant. Held-out loss before: {found['held_out_loss_before']:.4f}.",
            "",
            *markdown_table(loss_header, [_loss_row(runs, name, references) for name in runs]),
            "",
            *markdown_table(weight_header, [_weight_row(found, name, references) for name in found["weights"]]),
            "",
        ]
    )


def _loss_row(runs: dict[str, Any], name: str, references: Sequence[str]) -> list[str]:
    cells = [NAMES[name], f"{mean(runs[name]['losses'][-LAST:]):.4f}"]
    for reference in references:
        gaps = differences(runs, name, reference)
        cells += ["-", "-"] if name == reference else [interval(gaps[-LAST:]), f"{max(map(abs, gaps)):.4f}"]
    return [*cells, f"{runs[name]['seconds_per_update']:.1f}"]


def interval(values: Sequence[float]) -> str:
    """Mean and its 95 % interval, as if the values were independent."""
    error = 1.96 * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.4f} ± {error:.4f}"


def _weight_row(found: dict[str, Any], name: str, references: Sequence[str]) -> list[str]:
    weights = found["weights"][name]
    return [
        NAMES[name],
        f"{weights['moved']:.3f}",
        *("-" if name == reference else percent(weights["along"][reference]) for reference in references),
        percent(weights["changed"]),
        f"{weights['held_out_loss']:.4f}",
        f"{found['held_out_loss_before'] - weights['held_out_loss']:.4f}",
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Losses above, smoothed; below, each update's difference from the reference."""
    runs, reference = found["runs"], references_of(found["runs"])[0]
    with picture(path, (8, 6)) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True)
        for index, (name, run) in enumerate(runs.items()):
            losses, color = run["losses"], f"C{index}"
            style = "--" if name == "float32" else "-"  # the line below it shows through
            blocks = [losses[start : start + SMOOTHED] for start in range(0, len(losses), SMOOTHED)]
            middles = [SMOOTHED * number + (len(block) + 1) / 2 for number, block in enumerate(blocks)]
            top.plot(middles, list(map(mean, blocks)), style, color=color, label=NAMES[name])
            gaps = differences(runs, name, reference)
            bottom.plot(range(1, len(losses) + 1), gaps, style, color=color, linewidth=0.9)
        top.set(ylabel=f"loss, mean of {SMOOTHED} updates", title="Full fine-tuning with and without fp32 masters")
        bottom.set(xlabel="update", ylabel=f"less the loss with\n{NAMES[reference]}")
        top.legend()
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
