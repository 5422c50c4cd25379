"""Result records of an evaluation: made, summed up, written as CSV, JSONL, JSON and a picture, read back, compared.

All files stand beside the CSV and share its name: X.csv, X.jsonl, X_metrics.json, X_confusion.png.
"""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.paired_scores import check_same_rows
from finetune.statistics import compare, share
from finetune.text_files import read_json_lines, write_aside
from qwen_qlora.evaluation.answers import normalise
from qwen_qlora.evaluation.cases import EvaluationCase
from qwen_qlora.evaluation.metrics import classification_report, keyword_report

Record = dict[str, Any]
COLUMNS = ["row", "prompt", "gold", "predicted", "correct", "exact_match", "gold_class", "predicted_class"]
SCORE_COLUMNS = ["log_likelihood_same", "log_likelihood_different"]
NUM_DIGITS = 6  # of a log-likelihood


class ResultFiles:
    """The paths of one result, all derived from the CSV's."""

    def __init__(self, csv_path: str | Path) -> None:
        self.csv = Path(csv_path)
        if self.csv.suffix != ".csv":
            raise UserError(f"--result_file: expected a name that ends in .csv, got {csv_path}")
        self.jsonl = self.csv.with_suffix(".jsonl")
        self.metrics = self.csv.with_name(self.csv.stem + "_metrics.json")
        self.confusion = self.csv.with_name(self.csv.stem + "_confusion.png")
        self.partial = self.csv.with_name(self.csv.stem + ".partial.jsonl")


def asked(case: EvaluationCase) -> Record:
    """The part of a case's record that is known before it is answered."""
    return {"row": case.line, "prompt": case.prompt, "gold": case.gold}


def make_record(case: EvaluationCase, result: str | Sequence[float]) -> Record:
    """One result row from generated text, or from the log-likelihoods of the two valid answers."""
    scores = None if isinstance(result, str) else list(result)
    predicted = result if scores is None else case.answers.texts()[scores[1] > scores[0]]
    record = asked(case) | {"predicted": predicted}
    if case.answers is None:
        correct, classes = normalise(predicted) == normalise(case.gold), (None, None)
    else:
        classes = (case.answers.class_of(case.gold), case.answers.class_of(predicted))
        correct = classes[0] == classes[1]
    record |= {"correct": correct, "exact_match": predicted.strip() == case.gold.strip()}
    record |= {"gold_class": classes[0], "predicted_class": classes[1]}
    if scores is not None:
        record |= dict(zip(SCORE_COLUMNS, (round(score, NUM_DIGITS) for score in scores), strict=True))
    return record


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Scores of all records: accuracy and exact match, then by kind of row (labels, keywords), None where absent."""
    labels = [record for record in records if record["gold_class"] is not None]
    others = [record for record in records if record["gold_class"] is None]
    return {
        "rows": len(records),
        "accuracy": share(sum(record["correct"] for record in records), len(records)),
        "exact_match": share(sum(record["exact_match"] for record in records), len(records)),
        "labels": classification_report([r["gold_class"] for r in labels], [r["predicted_class"] for r in labels])
        if labels
        else None,
        "keywords": keyword_report([r["gold"] for r in others], [r["predicted"] for r in others]) if others else None,
    }


def write_records(files: ResultFiles, records: Sequence[Record]) -> None:
    """The CSV (with a BOM, so that spreadsheets read it as UTF-8) and the JSONL file."""
    text = io.StringIO()
    columns = COLUMNS + [column for column in SCORE_COLUMNS if column in records[0]]
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(records)
    write_aside(files.csv, text.getvalue(), encoding="utf-8-sig")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_aside(files.jsonl, "".join(lines))


def _kept_under(files: ResultFiles, config_hash: str) -> ResultFiles:
    return ResultFiles(files.csv.with_name(f"{files.csv.stem}-{config_hash[:8]}.csv"))


def _rename(files: ResultFiles, target: ResultFiles) -> None:
    # The metrics first: without them what is left counts as unfinished.
    for name in ("metrics", "csv", "jsonl", "confusion"):
        if getattr(files, name).exists():
            getattr(files, name).replace(getattr(target, name))


def set_aside(files: ResultFiles) -> None:
    """Rename a finished result that another one is about to replace: X.csv becomes X-HASH.csv, HASH its settings'."""
    done = read_metrics(files)
    if done is None:
        files.metrics.unlink(missing_ok=True)  # of an unfinished change: it would not belong to what is written now
        return
    kept = _kept_under(files, done["config_hash"])
    _rename(files, kept)
    print(f"kept: {kept.csv}, a result with other settings that stood in {files.csv}", file=sys.stderr)


def take_back(files: ResultFiles, config_hash: str) -> None:
    """Put the result with these settings back into its place, where it was set aside."""
    kept = _kept_under(files, config_hash)
    if (done := read_metrics(kept)) and done["config_hash"] == config_hash:
        set_aside(files)
        _rename(kept, files)


def write_metrics(files: ResultFiles, metrics: dict[str, Any]) -> None:
    """The metrics file: written last, it says that the others are complete."""
    write_aside(files.metrics, json.dumps(metrics, ensure_ascii=False, indent=2) + "\n")


def read_metrics(files: ResultFiles) -> dict[str, Any] | None:
    """The metrics of a finished evaluation; None when there is none, or a file beside them is missing."""
    if not all(path.exists() for path in (files.metrics, files.csv, files.jsonl)):
        return None
    return json.loads(files.metrics.read_text(encoding="utf-8"))


def read_records(path: str | Path) -> list[Record]:
    """Records of a result's JSONL file. Raises UserError when it is none."""
    try:
        records = read_json_lines(path)
        if records and all("correct" in record and "row" in record for record in records):
            return records
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the .jsonl file of an evaluation, but {error}") from None
    raise UserError(f"{path}: expected the .jsonl file of an evaluation. `make qwen-eval` writes it beside the CSV.")


def compare_records(records: Sequence[Record], other_path: str | Path) -> dict[str, Any]:
    """McNemar's test between two results over the same rows. Raises UserError when the rows differ."""
    others = read_records(other_path)
    check_same_rows(records, others, str(other_path))
    result = compare([r["correct"] for r in records], [r["correct"] for r in others])
    return {"other": str(other_path)} | result


def _percent(proportion: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in proportion["wilson_95"])
    counts = f"{proportion['correct']}/{proportion['total']}"
    return f"{100 * proportion['value']:.1f} %  ({counts}, 95 % interval {low:.1f} to {high:.1f})"


def report_lines(metrics: dict[str, Any]) -> list[str]:
    """What a person reads at the end."""
    lines = [f"accuracy     {_percent(metrics['accuracy'])}", f"exact match  {_percent(metrics['exact_match'])}"]
    if labels := metrics["labels"]:
        lines.append(f"{'':12} {'precision':>9} {'recall':>9} {'F1':>9} {'rows':>6}")
        for name, scores in labels["by_class"].items():
            values = " ".join(f"{scores[key]:9.4f}" for key in ("precision", "recall", "f1"))
            lines.append(f"{name:12} {values} {scores['support']:6}")
        lines.append(f"invalid answers: {labels['invalid']}")
    if words := metrics["keywords"]:
        lines.append(
            f"keywords     precision {words['precision']:.4f}, recall {words['recall']:.4f}, F1 {words['f1']:.4f}"
            f"  ({words['rows']} rows)"
        )
    if comparison := metrics.get("comparison"):
        lines += [
            f"compared with {comparison['other']}: {_percent(comparison['other_accuracy'])}",
            f"only this right {comparison['only_this_right']}, only the other right {comparison['only_other_right']}, "
            f"McNemar's exact test p = {comparison['mcnemar_exact_p']:.3g}",
        ]
    return lines
