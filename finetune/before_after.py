"""One page about a fine-tuned model: training, scores before and after, samples, contamination, environment.

    python -m finetune.before_after --train_dir OUTPUT_DIR --train_file TRAIN.jsonl --output_dir DIR \\
        --score "text matching" BASE.jsonl TUNED.jsonl [--score MMCU BASE/answers.jsonl TUNED/answers.jsonl ...]

Reads what training left in OUTPUT_DIR (train_report.json, loss.png) and the records of evaluations. Writes
DIR/report.md and DIR/report.html, which says the same in one file. `make qwen-report` and `make baichuan-report` run
it. A score whose files are missing is named on the page; a page without any score is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.answer_way import check_same_way, pair_asked_alike, read_config, read_way
from finetune.errors import UserError, run_main
from finetune.identity import ADAPTER_CONFIG, adapter_fingerprint, fingerprint
from finetune.page import Block, Heading, html_page, markdown
from finetune.paired_scores import Score, check_same_rows, read_records
from finetune.report_blocks import (
    contamination_blocks,
    environment_blocks,
    sample_blocks,
    score_blocks,
    training_blocks,
)
from finetune.saving import is_complete
from finetune.text_files import write_aside


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--title", help="name of the model on the page (default: the base model's, then --train_dir's)")
    parser.add_argument("--train_dir", required=True, type=Path, help="output folder of the training")
    parser.add_argument("--train_file", required=True, type=Path, help="rows it was trained on")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the page")
    parser.add_argument(
        "--score",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "BEFORE", "AFTER"),
        help="records of a test before and after; may be given several times",
    )
    return parser.parse_args()


def asked_alike(named: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[str]]:
    """The tests with records of one way, which may stand beside those named, and a remark for each of these."""
    found = [[name, *map(str, pair_asked_alike(*map(Path, paths)))] for name, *paths in named]
    taken = [(one[0], path) for one, asked in zip(found, named, strict=True) for path in one[1:] if path not in asked]
    return found, [f"{name}: {path} is taken, asked in the same way as the other." for name, path in taken]


def read_scores(named: Sequence[Sequence[str]]) -> tuple[list[Score], list[str]]:
    """The tests with both files, and a remark for each without. Raises UserError when none is left, or rows differ."""
    scores, remarks = [], []
    for name, *paths in named:
        missing = [path for path in paths if not Path(path).exists()]
        if missing:
            remarks.append(f"{name} is left out: {' and '.join(missing)} missing.")
            continue
        before, after = (read_records(Path(path)) for path in paths)
        check_same_rows(before, after, name)
        check_same_way(*(read_way(Path(path)) for path in paths), name)
        scores.append(Score(name, before, after))
    if not scores:
        raise UserError(
            "expected at least one test evaluated before and after, but "
            + " ".join(remarks)
            + " Evaluate the base model and the fine-tuned one first: README.md, Before and after."
        )
    return scores, remarks


def weights_remarks(named: Sequence[Sequence[str]], train_dir: Path) -> list[str]:
    """A remark for each test whose fine-tuned answers are of other weights than train_dir/final holds."""
    final, remarks = train_dir / "final", []
    if not is_complete(final):
        return []
    part = "adapter" if (final / ADAPTER_CONFIG).exists() else "model"
    here = (adapter_fingerprint if part == "adapter" else fingerprint)(final)
    for name, _, after in named:
        config = read_config(Path(after))
        there = None if "service" in config else config.get(part)  # a service's model is a name
        if there and there != here:
            remarks.append(
                f"{name}: the fine-tuned answers are of other weights ({there[:8]}) than {final} holds ({here[:8]}): "
                "they say nothing about this training. Evaluate it again."
            )
    return remarks


def read_training(train_dir: Path) -> dict[str, Any]:
    """What training wrote about itself. Raises UserError when it did not."""
    path = train_dir / "train_report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the report that training writes, but {error}. Train first.") from None


def model_name(report: dict[str, Any], train_dir: Path) -> str:
    """The folder name of the base model, and that of the run."""
    base = Path(report.get("config", {}).get("model_name_or_path") or "").name
    return f"{base}, {train_dir.name}" if base else train_dir.name


def main() -> None:
    """Write the page."""
    args = parse_args()
    report = read_training(args.train_dir)
    named, remarks = asked_alike(args.score)
    scores, missing = read_scores(named)
    remarks += missing + weights_remarks(named, args.train_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    title = args.title or model_name(report, args.train_dir)
    blocks: list[Block] = [Heading(f"{title}: before and after fine-tuning", 1)]
    blocks += score_blocks(scores, remarks, args.output_dir)
    blocks += training_blocks(report, args.train_dir, args.output_dir)
    blocks += sample_blocks(scores)
    blocks += contamination_blocks(scores, args.train_file)
    blocks += environment_blocks(report)
    write_aside(args.output_dir / "report.md", markdown(blocks, args.output_dir))
    write_aside(args.output_dir / "report.html", html_page(blocks))
    for remark in remarks:
        print(remark, file=sys.stderr)
    print(f"written: {args.output_dir / 'report.md'} {args.output_dir / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
