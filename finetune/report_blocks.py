"""The parts of the page about a fine-tuned model: scores, training, samples, contamination, environment."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.contamination import N, overlap
from finetune.countdown import format_seconds
from finetune.page import Block, Heading, Picture, Table, Text
from finetune.paired_scores import Difference, Score, adjusted, by_domain, difference, samples, score_key, verdict
from finetune.pictures import find_cjk_font, name_rows, picture
from finetune.rows import read_rows

NUM_SAMPLES = 8
NUM_EXAMPLES = 5
LONGEST_SAMPLE = 400
SCORE_HEADER = ["test", "rows", "before", "95 % interval", "after", "95 % interval", "change", "p", ""]


def number(value: float, key: str) -> str:
    """Accuracies in percent, BLEU as usual between 0 and 1."""
    return f"{100 * value:.1f} %" if key == "correct" else f"{value:.4f}"


def score_row(entry: Difference, key: str) -> list[str]:
    """One line of a table of scores."""
    low_high = [f"{number(low, key)} to {number(high, key)}" for low, high in (entry.before_95, entry.after_95)]
    change = f"{100 * entry.change:+z.1f} points" if key == "correct" else f"{entry.change:+z.4f}"
    values = [number(entry.before, key), low_high[0], number(entry.after, key), low_high[1], change]
    return [entry.name, f"{entry.num_rows:,}", *values, f"{entry.p:.3g} ({entry.test})", verdict(entry)]


def score_blocks(scores: Sequence[Score], remarks: Sequence[str], output_dir: Path) -> list[Block]:
    """The table of all tests, what it says in words, the picture, and tables by domain."""
    overall = adjusted([difference(score.name, score.before, score.after) for score in scores])
    keys = [score_key(score.before[0]) or "" for score in scores]
    rows = [score_row(entry, key) for entry, key in zip(overall, keys, strict=True)]
    blocks: list[Block] = [Heading("Scores"), Table(SCORE_HEADER, rows)]
    for entry in overall:
        word = verdict(entry)
        blocks.append(Text(f"{entry.name}: {word}{' after fine-tuning' if word in ('better', 'worse') else ''}."))
    blocks.append(Text("p values are adjusted for the number of lines in their table (Holm)."))
    blocks += [Text(remark) for remark in remarks]
    parts = [entry for score in scores for entry in by_domain(score.name, score.before, score.after)]
    draw_differences([*overall, *parts], output_dir / "scores.png")
    blocks.append(Picture(output_dir / "scores.png", "scores before and after"))
    for score, key in zip(scores, keys, strict=True):
        domains = [score_row(entry, key) for entry in by_domain(score.name, score.before, score.after)]
        if domains:
            blocks += [Heading(f"{score.name} by domain", 3), Table(SCORE_HEADER, domains)]
    return blocks


def draw_differences(entries: Sequence[Difference], path: Path) -> None:
    """Every score before and after with its 95 % interval."""
    font, shown = find_cjk_font(), list(entries)[::-1]
    with picture(path, (7.5, 1.2 + 0.4 * len(shown)), font) as figure:
        axes = figure.add_subplot()
        for shift, colour, label in ((0.12, "tab:gray", "before"), (-0.12, "tab:blue", "after")):
            values = [getattr(entry, label) for entry in shown]
            bounds = [getattr(entry, label + "_95") for entry in shown]
            errors = [
                [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
                [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
            ]
            places = [i + shift for i in range(len(shown))]
            axes.errorbar(values, places, xerr=errors, fmt="o", color=colour, capsize=3, label=label)
        name_rows(axes, [entry.name for entry in shown], font)
        axes.set(
            xlabel="BLEU, or share of right answers, with 95 % interval", xlim=(0, 1), ylim=(-0.5, len(shown) - 0.5)
        )
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper right", ncols=2)


def training_blocks(report: dict[str, Any], train_dir: Path, output_dir: Path) -> list[Block]:
    """What was trained, how long, at what cost; the curve where there is one."""
    names = report.get("names", {})
    facts = [
        *([name.replace("_", " "), text] for name, text in names.items()),
        ["folder", str(train_dir)],
        ["method", report["method"]],
        ["status", report["status"]],
        ["updates", f"{report['updates']:,} of {report['updates_planned']:,}"],
        ["time", format_seconds(report["seconds"])],
        ["tokens", f"{report['tokens']:,}, of them supervised {report['supervised_tokens']:,}"],
        ["tokens a second", f"{report['tokens_per_second'] or 0:,.0f}"],
        *([["cost", f"{report['cost']:.2f} yuan"]] if report["cost"] else []),  # 0 without PRICE_PER_HOUR
        ["devices", report["devices"]],
    ]
    blocks: list[Block] = [Heading("Training"), Table(["", ""], facts)]
    if (train_dir / "loss.png").exists():
        shutil.copyfile(train_dir / "loss.png", output_dir / "loss.png")
        blocks.append(Picture(output_dir / "loss.png", "training curve"))
    return blocks


def sample_blocks(scores: Sequence[Score]) -> list[Block]:
    """Some answers of each test side by side."""
    blocks: list[Block] = [Heading("Samples"), Text("Chosen by a hash of the row, not by their scores.")]
    for score in scores:
        key = score_key(score.before[0]) or ""
        rows = [
            [str(text)[:LONGEST_SAMPLE] for text in (first["prompt"], first["gold"], said(first), said(second))]
            + [f"{mark(first[key])} / {mark(second[key])}"]
            for first, second in samples(score.before, score.after, NUM_SAMPLES)
        ]
        blocks += [Heading(score.name, 3), Table(["asked", "gold", "before", "after", "score"], rows)]
    return blocks


def said(record: dict[str, Any]) -> str:
    """What the model answered; where a letter was wanted and none could be read, the text it wrote."""
    text = str(record["predicted"]).strip()
    if text:
        return text
    written = str(record.get("answer") or "").strip()
    return f"nothing clear in: {written}" if written else "(empty)"


def mark(score: bool | float) -> str:
    """right, wrong, or the number."""
    return ("right" if score else "wrong") if isinstance(score, bool) else f"{score:.3f}"


def contamination_blocks(scores: Sequence[Score], train_file: Path) -> list[Block]:
    """How much of each test stands in the training file."""
    train = read_rows(train_file)
    found = [
        overlap(train, [r["prompt"] for r in score.after], [str(r["gold"]) for r in score.after]) for score in scores
    ]
    header = ["test", "rows", "question is in the training file", f"shares {N} characters with a training row"]
    rows = [
        [score.name, f"{entry.total:,}", f"{len(entry.exact):,}", f"{len(entry.shared):,}"]
        for score, entry in zip(scores, found, strict=True)
    ]
    blocks: list[Block] = [
        Heading("Contamination"),
        Text(f"Compared with {train_file}, {len(train):,} rows. What a template puts into many rows does not count."),
        Table(header, rows),
    ]
    examples = [
        [score.name, str(score.after[i]["row"]), str(line), shared[:LONGEST_SAMPLE]]
        for score, entry in zip(scores, found, strict=True)
        for i, line, shared in entry.examples[:NUM_EXAMPLES]
    ]
    if examples:
        blocks.append(Table(["test", "row", "line of the training file", "what they share"], examples))
    return blocks


def environment_blocks(report: dict[str, Any]) -> list[Block]:
    """Versions, commit and the run's identity."""
    rows = [[name, text] for name, text in report["versions"].items()]
    rows += [["git commit", str(report["git_commit"])], ["configuration file", str(report["config_file"])]]
    unused = ("lora_", "fp8_backward") if report["method"].startswith("all parameters") else ()
    settings = {key: value for key, value in report["identity"].items() if not key.startswith(unused)}
    config = report.get("config", {})
    length = "max_steps" if config.get("max_steps", 0) > 0 else "num_train_epochs"
    settings |= {length: config[length]} if length in config else {}
    rows += [[key.replace("_", " "), str(value)] for key, value in settings.items()]
    return [Heading("Environment"), Table(["", ""], rows)]
