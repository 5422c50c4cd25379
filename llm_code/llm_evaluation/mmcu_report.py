"""The report of an MMCU run as text, Markdown and a picture, from the sums of mmcu_statistics."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.pictures import find_cjk_font, name_rows, picture
from finetune.statistics import SIGNIFICANT
from finetune.tables import markdown_table, percent, text_table
from llm_code.llm_evaluation.mmcu_statistics import Record

NUM_SAMPLES = 20
SCORE_HEADER = ["", "questions", "official", "strict", "95 % interval", "one letter", "several", "invalid"]
COMPARED_HEADER = ["", "official", "p (Holm)", "strict", "p (Holm)"]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]


def choose_samples(records: Sequence[Record]) -> list[Record]:
    """Twenty questions, always the same ones of the same data."""
    by_hash = sorted(records, key=lambda record: hashlib.sha256(("sample " + record["row"]).encode()).digest())
    return sorted(by_hash[:NUM_SAMPLES], key=records.index)


def interval(share: dict[str, Any]) -> str:
    """34.5 to 41.0"""
    low, high = share["wilson_95"]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def score_row(name: str, official: dict[str, Any], strict: dict[str, Any]) -> list[str]:
    """One line of the table; the interval and what follows it belong to the strict reading."""
    parts = [percent(strict[key]["value"]) if strict[key]["total"] else "-" for key in ("single", "several")]
    total = strict["accuracy"]["total"]
    accuracies = [percent(scores["accuracy"]["value"]) for scores in (official, strict)]
    invalid = percent(strict["invalid"] / total) if total else "-"
    return [name, f"{total:,}", *accuracies, interval(strict["accuracy"]), *parts, invalid]


def score_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """A line for each subject, then each domain, then all."""
    official, strict = metrics["official"], metrics["strict"]
    rows = [score_row(name, official["subjects"][name], scores) for name, scores in strict["subjects"].items()]
    rows += [
        score_row(f"{name} (all)", official["domains"][name], scores) for name, scores in strict["domains"].items()
    ]
    return [*rows, score_row("all questions", official["overall"], strict["overall"])]


def macro_line(metrics: dict[str, Any]) -> str:
    """The benchmark's own figure: the mean over domains of the mean over their subjects."""
    parts = []
    for mode in ("official", "strict"):
        domains = ", ".join(f"{name} {percent(scores['macro'])}" for name, scores in metrics[mode]["domains"].items())
        parts.append(f"{mode} {percent(metrics[mode]['overall']['macro'])} ({domains})")
    return "mean of the domains: " + "; ".join(parts)


def comparison_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """A line for each subject and one for all; the last one's p needs no adjustment."""
    rows = []
    for name in [*comparison["strict"]["subjects"], None]:
        cells = []
        for mode in ("official", "strict"):
            scores = comparison[mode]["subjects"][name] if name else comparison[mode]["overall"]
            p = scores["holm_p"] if name else scores["mcnemar_exact_p"]
            cells += [f"{100 * scores['difference']:+.1f}", f"{p:.3g}"]
        rows.append([name or "all questions", *cells])
    return rows


def verdict(comparison: dict[str, Any]) -> str:
    """One sentence that names no winner inside the noise."""
    overall = comparison["strict"]["overall"]
    p, points = overall["mcnemar_exact_p"], 100 * overall["difference"]
    if p >= SIGNIFICANT:
        return f"No difference beyond chance (strict, {points:+.1f} points, McNemar's exact p = {p:.3g})."
    better = "better" if points > 0 else "worse"
    return f"This run is {better} than the other (strict, {points:+.1f} points, McNemar's exact p = {p:.3g})."


def run_lines(metrics: dict[str, Any]) -> list[str]:
    """What was asked of what, so that the figures can be made again."""
    config, timing = metrics["config"], metrics["timing"]
    total, speed = metrics["strict"]["overall"]["accuracy"]["total"], timing["questions_per_second"]
    computed, all_prompts = timing["questions_computed"], timing.get("questions", 0)
    asked = f"{computed:,} of {all_prompts:,}" if computed < all_prompts else f"{computed:,}"  # after an interruption
    limit = f" of at most {config['max_new_tokens']} tokens (max_new_tokens)" if "max_new_tokens" in config else ""
    lines = [
        f"model {metrics['model']} ({config.get('adapter') or config.get('weights') or config.get('model')})",
        f"answers by {config['answer']}{limit}, {config['ntrain']} worked examples, {total:,} questions",
        f"data {config['data']}, prompts {config['prompts']}",
        f"code {metrics['git_commit']}, configuration {metrics['config_hash']}",
        f"{asked} prompts in {timing['seconds']:.1f} s, {speed:.1f} a second",
    ]
    return lines + metrics["remarks"]


def text_report(metrics: dict[str, Any]) -> str:
    """What is printed at the end and kept as report.txt."""
    lines = [*text_table(SCORE_HEADER, score_rows(metrics)), "", macro_line(metrics)]
    lines.append("interval, letters and invalid answers are of the strict reading")
    if comparison := metrics.get("comparison"):
        lines += ["", f"difference to {comparison['other']} in points:"]
        lines += [*text_table(COMPARED_HEADER, comparison_rows(comparison)), verdict(comparison)]
    return "\n".join([*lines, "", *run_lines(metrics)]) + "\n"


def markdown_report(metrics: dict[str, Any]) -> str:
    """The same as Markdown, with the picture and twenty samples."""
    lines = ["# MMCU", "", "![accuracy by subject](report.png)", ""]
    lines += [*markdown_table(SCORE_HEADER, score_rows(metrics)), "", macro_line(metrics) + ".", ""]
    lines += ["Interval, letters and invalid answers are of the strict reading.", ""]
    if comparison := metrics.get("comparison"):
        lines += ["## Compared", "", f"Difference to {comparison['other']} in points. {verdict(comparison)}", ""]
        lines += [*markdown_table(COMPARED_HEADER, comparison_rows(comparison)), ""]
    lines += ["## Run", "", *(f"- {line}" for line in run_lines(metrics)), "", "## Samples", ""]
    header = ["question", "answer of the model", "official", "strict", "right"]
    rows = [
        [r["prompt"], r["answer"][:200], r["official_predicted"], r["predicted"] or "-", r["gold"]]
        for r in metrics["samples"]
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def draw_report(metrics: dict[str, Any], path: Path) -> None:
    """Accuracy of every subject in both readings, the strict one with its interval."""
    strict, official = metrics["strict"]["subjects"], metrics["official"]["subjects"]
    font, names = find_cjk_font(), list(strict)[::-1]
    with picture(path, (7.5, 1.2 + 0.26 * len(names)), font) as figure:
        axes = figure.add_subplot()
        places = range(len(names))
        values = [100 * strict[name]["accuracy"]["value"] for name in names]
        bounds = [[100 * bound for bound in strict[name]["accuracy"]["wilson_95"]] for name in names]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
        ]
        axes.barh(places, values, xerr=errors, color="tab:blue", alpha=0.7, ecolor="0.3", label="strict")
        others = [100 * official[name]["accuracy"]["value"] for name in names]
        axes.plot(others, places, "o", color="tab:orange", markersize=4, label="official")
        name_rows(axes, names, font)
        axes.set(xlabel="accuracy, %", xlim=(0, 100))
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower right")
