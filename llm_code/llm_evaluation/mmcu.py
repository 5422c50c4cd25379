"""Evaluate a model on MMCU, Chinese multiple-choice questions in four domains: `make baichuan-eval-mmcu`.

    python -m llm_code.llm_evaluation.mmcu --data_dir DIR --ntrain 0 --save_dir ./result/mmcu/ \\
        --model_name_or_path DIR [--adapter_name_or_path DIR] [--answer likelihood|engine|service] [--limit 500]

Reads DIR/test/*.xlsx (and dev/ for --ntrain 5). Writes into save_dir a file for each subject as the benchmark's own
script does, answers.jsonl with every question, and report.txt, report.json, report.md, report.png. Every question is
scored twice: `official` as the benchmark's script does it, `strict` with the options kept whole and the answer read
with care. partial.jsonl holds the finished batches of an interrupted run, which goes on where it was. Where save_dir
holds a run with other settings, such as one of all questions, --limit or another --answer writes into a folder in it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from finetune.errors import UserError, run_main
from finetune.flag_types import natural
from finetune.paired_scores import check_comparable
from finetune.partial_results import PartialResults, canonical_json, config_hash
from finetune.text_files import read_json_lines, write_aside
from llm_code.llm_evaluation.answering import Decoding, Prompt
from llm_code.llm_evaluation.asking import (
    add_model_flags,
    collect,
    kept_tag,
    make_answerer,
    may_reuse,
    place_beside,
    set_aside,
    standing_config,
)
from llm_code.llm_evaluation.mmcu_data import (
    Question,
    data_hash,
    find_data_dir,
    read_questions,
    read_shots,
    stem_of,
    stratified,
)
from llm_code.llm_evaluation.mmcu_prompts import LETTERS, MODES, opening, prompt
from llm_code.llm_evaluation.mmcu_statistics import (
    Record,
    asked,
    by_subject,
    compare_runs,
    make_record,
    subject_file,
    summarise,
)

SUBSETS = ["".join(letters) for size in range(1, 5) for letters in combinations(LETTERS, size)]
WAYS = ("generate", "likelihood", "engine", "service")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with test/ and dev/ in it")
    parser.add_argument("--ntrain", type=natural, default=0, help="worked examples before a question (default: 0)")
    parser.add_argument("--save_dir", required=True, type=Path, help="folder of the results")
    parser.add_argument(
        "--limit", type=natural, default=0, help="questions, from all subjects in proportion (default: all)"
    )
    parser.add_argument("--compare_with", metavar="DIR", help="save_dir of another model: paired differences to it")
    add_model_flags(parser, WAYS, max_new_tokens=16)
    return parser.parse_args()


def make_prompts(questions: Sequence[Question], shots: dict[str, list[Question]]) -> dict[str, list[Prompt]]:
    """The prompts of all questions, by mode."""
    return {
        mode: [Prompt(prompt(mode, shots[stem_of(q)], q), opening(mode, shots[stem_of(q)])) for q in questions]
        for mode in MODES
    }


def read_answers(folder: str | Path) -> list[Record]:
    """Records of a finished run. Raises UserError when the folder holds none."""
    path = Path(folder) / "answers.jsonl"
    try:
        return read_json_lines(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the answers of an MMCU run, but {error}") from None


def finished_report(save_dir: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a run that is done with this configuration, else None."""
    path = save_dir / "report.json"
    if not may_reuse(config) or not path.exists() or not (save_dir / "answers.jsonl").exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return report if canonical_json(report["config"]) == canonical_json(config) else None


def folder_of(save_dir: Path, config: dict[str, Any]) -> Path:
    """save_dir, or a folder in it where a run with other settings stands."""
    name = place_beside(standing_config(save_dir / "report.json", save_dir / "partial.jsonl"), config)
    if name:
        print(f"{save_dir} keeps its run with other settings: this one goes to {save_dir / name}", file=sys.stderr)
    return save_dir / name


def clear_place(save_dir: Path) -> None:
    """Make room for new results: a finished run's become SAVE_DIR-HASH, those of an unfinished one are removed.

    Its report goes first, since it says that the others are complete, its subject files too: the next run may be of
    fewer subjects.
    """
    report, answers = save_dir / "report.json", save_dir / "answers.jsonl"
    subjects = list(by_subject(read_answers(save_dir))) if answers.exists() else []
    if report.exists() and answers.exists():
        done = json.loads(report.read_text(encoding="utf-8"))
        beside = save_dir.with_name
        kept = beside(save_dir.name + kept_tag(done, lambda tag: beside(save_dir.name + tag)))
        names = ["report.json", "report.txt", "report.md", "report.png", *subjects, "answers.jsonl"]
        return set_aside([(save_dir / name, kept / name) for name in names], kept)
    for name in ("report.json", *subjects):
        (save_dir / name).unlink(missing_ok=True)


def ask(
    args: argparse.Namespace, questions: Sequence[Question], prompts: dict, answerer: Any, config: dict
) -> tuple[dict[str, Any], PartialResults]:
    """Answer what is not answered yet, write records and subject files; returns how long it took, and the partial file.

    The caller removes that file when the report is written.
    """
    unique = list({p.text: p for mode in MODES for p in prompts[mode]}.values())  # most questions ask the same twice
    texts, timing, partial = collect(answerer, unique, args.save_dir / "partial.jsonl", config)
    answers = {p.text: text for p, text in zip(unique, texts, strict=True)}
    records = [
        make_record(question, answers[official.text], answers[strict.text])
        for question, official, strict in zip(questions, prompts["official"], prompts["strict"], strict=True)
    ]
    clear_place(args.save_dir)
    write_aside(args.save_dir / "answers.jsonl", "".join(canonical_line(record) for record in records))
    for subject, part in by_subject(records).items():  # after the records, which say what to remove
        write_aside(args.save_dir / subject, subject_file(part))
    return timing, partial


def canonical_line(record: Record) -> str:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_report(args: argparse.Namespace, metrics: dict[str, Any]) -> None:
    """report.txt, .md, .png and last .json, which says that the others are complete; prints the text."""
    from llm_code.llm_evaluation.mmcu_report import choose_samples, draw_report, markdown_report, text_report

    records = read_answers(args.save_dir)
    metrics |= {mode: summarise(records, mode) for mode in MODES}
    metrics["comparison"] = (
        compare_runs(records, read_answers(args.compare_with), args.compare_with) if args.compare_with else None
    )
    metrics["samples"] = choose_samples(records)
    text = text_report(metrics)
    write_aside(args.save_dir / "report.txt", text)
    write_aside(args.save_dir / "report.md", markdown_report(metrics))
    draw_report(metrics, args.save_dir / "report.png")
    write_aside(args.save_dir / "report.json", json.dumps(metrics, ensure_ascii=False, indent=2) + "\n")
    print(text, end="")
    print(f"written: {args.save_dir}/report.txt, report.md, report.json, report.png, answers.jsonl, a file a subject")


def main() -> None:
    """Evaluate, or say that it is done already."""
    args = parse_args()
    data_dir = find_data_dir(args.data_dir)
    questions, remarks = read_questions(data_dir)
    questions = stratified(questions, args.limit)
    prompts = make_prompts(questions, read_shots(data_dir, args.ntrain))
    answerer = make_answerer(args, Decoding(args.max_new_tokens), SUBSETS)

    from finetune.report import git_commit

    config = {"data": data_hash(data_dir), "ntrain": args.ntrain, "limit": args.limit}
    config |= answerer.identity([p for mode in MODES for p in prompts[mode]])
    if args.compare_with:
        rows, path = [asked(question) for question in questions], Path(args.compare_with) / "answers.jsonl"
        check_comparable(rows, config, read_answers(path.parent), path, f"--compare_with {args.compare_with}")
    args.save_dir = folder_of(args.save_dir, config)
    done, partial = finished_report(args.save_dir, config), None
    if done:
        print(f"already done: {args.save_dir}")
        timing, commit = done["timing"], done["git_commit"]
    else:
        timing, partial = ask(args, questions, prompts, answerer, config)
        commit = git_commit(Path(__file__).parent)
    model = args.adapter_name_or_path or args.model_name_or_path or config["model"]
    about = {"model": model, "git_commit": commit, "remarks": remarks, "timing": timing}
    write_report(args, about | {"config": config, "config_hash": config_hash(config)})
    if partial:
        partial.remove()


if __name__ == "__main__":
    run_main(main)
