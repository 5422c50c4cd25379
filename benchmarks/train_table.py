"""The results of benchmarks.bench_train as a Markdown table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.train_plan import UNMOVED
from finetune.pictures import picture
from finetune.tables import markdown_table, percent

REFERENCES = {"QLoRA": "qlora", "all parameters": "full"}  # what the others of a group are compared with
HEADER = (
    "run",
    "tokens/s",
    "slowest to fastest round",
    "ours is faster by",
    "share of the product rate",
    "peak GiB",
    "planned GiB",
    "tokens at once",
    "layers kept",
    "losses before a step differ by",
    "first losses differ by at most",
    "loads in s",
)
# One card and several; each is compared with one card and the same model.
CARDS = "cards"
CARDS_HEADER = tuple({"ours is faster by": "times one card", "peak GiB": "peak GiB a card"}.get(x, x) for x in HEADER)
ROWS_HEADER = (
    "rows",
    "tokens",
    "read s",
    "encode s",
    "plan s",
    "collate s",
    "rows/s",
    "tokens/s",
    "faster than training by",
)
COMPARED = 5  # losses of the first updates: with random weights later ones drift apart by rounding
# The groups that are about losses, and what they are compared with there.
EXACT = {
    "losses": "losses-float32",
    "losses in float32": "exact-padded-32",
    "losses in float32, 14B": "exact-padded-4-14b",
}
Result = dict[str, Any]


def grouped(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Group -> name -> a result a round: the newest of each, those that finished where any did."""
    groups: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        groups.setdefault(result["group"], {}).setdefault(result["name"], {})[result["round"]] = result
    return {group: {name: _finished(rounds) for name, rounds in runs.items()} for group, runs in groups.items()}


def _finished(rounds: dict[int, Result]) -> list[Result]:
    return [line for line in rounds.values() if line["status"] == "done"] or list(rounds.values())[-1:]


def speed_of(lines: Sequence[Result]) -> float | None:
    """The median of the rounds, None for a run that did not finish."""
    speeds = [line["tokens_per_second"] for line in lines if line["status"] == "done"]
    return median(speeds) if speeds else None


def loss_differences(lines: Sequence[Result], reference: Sequence[Result] | None) -> list[float]:
    """Largest difference of the losses before the adapter moves, and of those of the first updates; [] without any."""
    if not reference or reference[0]["status"] != "done" or lines[0] is reference[0]:
        return []
    if len({one[0]["rows_per_update"] for one in (lines, reference) if "rows_per_update" in one[0]}) > 1:
        return []
    pairs = zip(lines[0]["losses"][:COMPARED], reference[0]["losses"], strict=False)
    differences = [abs(one - other) for one, other in pairs]
    return [max(differences[:UNMOVED]), max(differences)] if differences else []


def table(results: Sequence[Result]) -> str:
    """Markdown: where it was measured, a table for each group, and what did not run, in words."""
    if not results:
        return "nothing was measured\n"
    last = results[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(sorted({line["git_commit"] or "unknown" for line in results}))
    days = sorted({line["date"][:10] for line in results})
    days = days[:1] + days[1:][-1:]
    # One rate for all: it is measured in moments, between which the card grows warm, and so differs by a tenth.
    rates = [line["product_rate_tflops"] for line in results]
    rate = median(rates)
    spread = f" (median, {min(rates):.4g} to {max(rates):.4g})" if len(set(rates)) > 1 else ""
    blocks = [
        f"{last['device']}: a large product runs at {rate:.4g} TFLOP/s{spread}. {versions}. "
        f"Commit {commits}, {' to '.join(days)}."
    ]
    groups = grouped(results)
    training = speed_of(groups.get("QLoRA", {}).get("qlora", []))
    for group, runs in groups.items():
        finished = {name: lines for name, lines in runs.items() if lines[0]["status"] == "done"}
        header, rows = HEADER, []
        if group == CARDS:
            header, rows = CARDS_HEADER, [_row(lines, _one_card(lines, runs), rate) for lines in finished.values()]
        elif group == "rows":
            header, rows = ROWS_HEADER, [_data_row(lines[0], training) for lines in finished.values()]
        elif group in EXACT:
            header, rows = ("update", *finished), _loss_rows(finished, EXACT[group])
        else:
            reference = runs.get(REFERENCES.get(group, ""))
            rows = [_row(lines, reference, rate) for lines in finished.values()]
        failed = [f"- {name}: {lines[0]['status']}" for name, lines in runs.items() if name not in finished]
        blocks.append(f"**{group}**")
        blocks.extend(["\n".join(markdown_table(header, rows))] if rows else [])
        blocks.extend(["Did not run:\n\n" + "\n".join(failed)] if failed else [])
    return "\n\n".join(blocks) + "\n"


def _one_card(lines: Sequence[Result], runs: dict[str, list[Result]]) -> list[Result] | None:
    """The run of the same model on one card."""
    return next((of for of in runs.values() if of[0]["model"] == lines[0]["model"] and of[0]["gpus"] == 1), None)


def _row(lines: Sequence[Result], reference: Sequence[Result] | None, rate: float) -> list[str]:
    one, speeds = lines[0], [line["tokens_per_second"] for line in lines]
    times = speed_of(reference) / median(speeds) if reference and speed_of(reference) else None
    times = None if times is None or one is reference[0] else 1 / times if one["group"] == CARDS else times
    differences = [f"{difference:.1e}" for difference in loss_differences(lines, reference)]
    share = median(line["tflops"] for line in lines) / rate / one.get("gpus", 1)
    return [
        one["name"],
        f"{median(speeds):,.0f}",
        f"{min(speeds):,.0f} to {max(speeds):,.0f}" if len(speeds) > 1 else "-",
        _text(times, ".2f"),
        # A model for a CPU is so small that the share would say nothing.
        "-" if one["device"] == "cpu" else percent(share),
        _text(one["peak_memory_gib"], ".1f"),
        _text(one["predicted"].get("peak_memory_gib"), ".1f"),
        _text(one["token_budget"], ",d"),
        _text(one["layers_kept"], "d"),
        *(differences or ["-", "-"]),
        _text(one["seconds_to_load"], ".0f"),
    ]


def _data_row(result: Result, ours: float | None) -> list[str]:
    """The rows' way to the card, compared with the speed at which the card takes them."""
    stages, speed = result["stage_seconds"], result["tokens_per_second"]
    return [
        f"{result['rows']:,}",
        f"{result['tokens']:,}",
        *(f"{stages[stage]:.2f}" for stage in ("read", "encode", "plan", "collate")),
        f"{result['rows_per_second']:,}",
        f"{speed:,}",
        f"{speed / ours:.0f}" if ours else "-",
    ]


def _loss_rows(runs: dict[str, list[Result]], reference: str) -> list[list[str]]:
    """A row an update, then how far each way is from the reference: in its mean, and in the worst update."""
    losses = {name: lines[0]["losses"] for name, lines in runs.items()}
    updates = max(map(len, losses.values()), default=0)
    rows = [
        [str(update + 1), *(f"{of[update]:.4f}" if update < len(of) else "-" for of in losses.values())]
        for update in range(updates)
    ]
    if reference not in losses:
        return rows
    apart = [
        [one - other for one, other in zip(of, losses[reference], strict=False)] if name != reference else []
        for name, of in losses.items()
    ]
    rows.append(["mean", *(f"{mean(values):+.4f}" if values else "-" for values in apart)])
    rows.append(["worst", *(f"{max(map(abs, values)):.1e}" if values else "-" for values in apart)])
    return rows


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel a group: bars of what is compared, a line over what a sweep varies."""
    groups = {group: runs for group, runs in grouped(results).items() if group not in EXACT}
    panels = {group: runs for group, runs in groups.items() if any(map(speed_of, runs.values()))}
    if not panels:
        return
    with picture(path, (8, 3 * len(panels))) as figure:
        for axes, (group, runs) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
            finished = {name: lines for name, lines in runs.items() if speed_of(lines)}
            (_line if next(iter(finished.values()))[0]["value"] is not None else _bars)(axes, group, finished)


def _bars(axes: Any, group: str, runs: dict[str, list[Result]]) -> None:
    speeds = [speed_of(lines) for lines in runs.values()]
    spread = [max(abs(line["tokens_per_second"] - speed_of(lines)) for line in lines) for lines in runs.values()]
    peaks = [lines[0]["peak_memory_gib"] for lines in runs.values()]
    bars = axes.barh(list(runs), speeds, height=0.6, xerr=spread)
    texts = [f"{speed:,.0f}{f', {peak:.1f} GiB' if peak else ''}" for speed, peak in zip(speeds, peaks, strict=True)]
    axes.bar_label(bars, texts, padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(title=f"{group}: trained tokens per second, peak memory", ylim=(max(3, len(runs)) - 0.5, -0.5))


def _line(axes: Any, group: str, runs: dict[str, list[Result]]) -> None:
    points = sorted((lines[0]["value"], speed_of(lines)) for lines in runs.values())
    axes.plot(*zip(*points, strict=True), "o-")
    axes.set(title=f"tokens per second over {group}", xscale="log", ylim=(0, 1.1 * max(speed for _, speed in points)))
    axes.set_xticks([value for value, _ in points], [f"{value:,g}" for value, _ in points])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
