"""Answer the test questions and score the answers with BLEU over characters: `make baichuan-eval-bleu`.

    python -m llm_code.llm_evaluation.bleu --model_name_or_path DIR --test_file TEST.jsonl \\
        --input_file ./result/psychology_result.txt --save_file ./result/bleu/psychology_result_bleu.txt
    python -m llm_code.llm_evaluation.bleu --input_file FINISHED.txt --save_file SCORED.txt     # scores alone

With --test_file the model's answers are written to --input_file first (INPUT_FILE.partial.jsonl holds the finished
batches of an interrupted run, INPUT_FILE.json what made the file). Then that file is scored: --save_file has a line for
each row and the average last; .json, .jsonl and .png with the same name have everything else. Nothing is appended.
Where the answers of a run with other settings stand, such as all questions, --limit or another --answer writes into a
folder beside them and beside the scored file.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import UserError, run_main
from finetune.flag_types import amount, natural
from finetune.paired_scores import check_comparable, check_same_rows
from finetune.partial_results import canonical_json, config_hash, sha256_of
from finetune.statistics import SIGNIFICANT, paired_bootstrap
from finetune.tables import percent
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
from llm_code.llm_evaluation.bleu_files import (
    ScoreFiles,
    answers_text,
    draw_scores,
    read_answers,
    read_questions,
    records_text,
    scored_text,
)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_file", required=True, type=Path, help="finished answers; written with --test_file")
    parser.add_argument("--save_file", required=True, help="the scored file to write")
    parser.add_argument("--test_file", help="questions for the model, .jsonl with instruction, input, output")
    parser.add_argument("--limit", type=natural, default=0, help="questions from the top of the file (default 0: all)")
    parser.add_argument("--temperature", type=amount, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="with a temperature: share of probability drawn from")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature: the same seed gives the same bytes")
    parser.add_argument(
        "--compare_with", metavar="OTHER.jsonl", help="another result: paired bootstrap between the two"
    )
    add_model_flags(parser, ("generate", "engine", "service"), max_new_tokens=512)
    return parser.parse_args()


def answer_questions(args: argparse.Namespace, others: list[dict[str, Any]] | None) -> None:
    """Write the model's answers to --input_file, unless they are there already. Raises UserError before it asks.

    `others` are the records of --compare_with.
    """
    from finetune.report import git_commit

    questions = read_questions(args.test_file)[: args.limit or None]
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    answerer, prompts = make_answerer(args, decoding), [Prompt(question.input) for question in questions]
    config = {"test_file": sha256_of(args.test_file), "limit": args.limit} | answerer.identity(prompts)
    if others is not None:
        rows = [{"row": q.row, "prompt": q.input, "gold": q.target} for q in questions]
        check_comparable(rows, config, others, Path(args.compare_with), f"--compare_with {args.compare_with}")
    set_places(args, config)
    record = args.input_file.with_name(args.input_file.name + ".json")
    if is_answered(args.input_file, record, config):
        return print(f"already answered: {args.input_file}")
    partial_path = args.input_file.with_name(args.input_file.name + ".partial.jsonl")
    texts, timing, partial = collect(answerer, prompts, partial_path, config)
    clear_place(args.input_file, record, ScoreFiles(args.save_file))
    write_aside(args.input_file, answers_text(questions, texts))
    model = args.adapter_name_or_path or args.model_name_or_path or config["model"]
    about = {"model": model, "git_commit": git_commit(Path(__file__).parent), "timing": timing}
    about |= {"answers": sha256_of(args.input_file), "config": config, "config_hash": config_hash(config)}
    write_aside(record, json.dumps(about, ensure_ascii=False, indent=2) + "\n")
    partial.remove()


def clear_place(answers: Path, record: Path, scores: ScoreFiles) -> None:
    """Make room for new answers: finished ones and their scores are kept under names with their settings' hash."""
    about = read_record(answers, record)
    if about is None:
        return record.unlink(missing_ok=True)
    tag = kept_tag(about, lambda tag: _tagged(answers, tag))
    kept = _tagged(answers, tag)
    moves = [(record, kept.with_name(kept.name + ".json")), (answers, kept)]
    scored = (scores.summary, scores.scored, scores.records, scores.picture)
    set_aside([*moves, *((path, _tagged(path, tag)) for path in scored)], kept)


def _tagged(path: Path, tag: str) -> Path:
    return path.with_name(f"{path.stem}{tag}{path.suffix}")


def set_places(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Move --input_file and --save_file into a folder where a run with other settings stands."""
    record, partial = (args.input_file.with_name(args.input_file.name + end) for end in (".json", ".partial.jsonl"))
    if name := place_beside(standing_config(record, partial), config):
        kept, scored = args.input_file, Path(args.save_file)
        args.input_file, args.save_file = kept.parent / name / kept.name, str(scored.parent / name / scored.name)
        print(f"{kept} keeps its run with other settings: this one goes to {args.input_file}", file=sys.stderr)


def is_answered(path: Path, record: Path, config: dict[str, Any]) -> bool:
    """Whether the finished file is the one that this configuration gives."""
    about = read_record(path, record)
    return about is not None and may_reuse(config) and canonical_json(about["config"]) == canonical_json(config)


def read_record(path: Path, record: Path) -> dict[str, Any] | None:
    """What made a finished file; None for one that is missing, comes from elsewhere or was changed afterwards."""
    if not (path.exists() and record.exists()):
        return None
    about = json.loads(record.read_text(encoding="utf-8"))
    return about if about.get("answers") == sha256_of(path) else None


def read_scores(path: str) -> list[dict[str, Any]]:
    """Records of a scored file's .jsonl. Raises UserError when it is none."""
    try:
        records = read_json_lines(path)
        if records and all("bleu" in record for record in records):
            return records
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected the .jsonl file beside a scored file, but {error}") from None
    raise UserError(f"{path}: expected the .jsonl file beside a scored file, which `make baichuan-eval-bleu` writes.")


def score_answers(args: argparse.Namespace, others: list[dict[str, Any]] | None) -> None:
    """Score --input_file into --save_file and the files beside it; prints the summary.

    `others` are the records of --compare_with. Raises UserError when their questions are others.
    """
    from llm_code.llm_evaluation.bleu_scoring import score_pairs

    files, answers, comparison = ScoreFiles(args.save_file), read_answers(args.input_file), None
    if others is not None:
        rows = [{"row": a["row"], "prompt": a["input"], "gold": a["target"]} for a in answers]
        check_same_rows(rows, others, f"--compare_with {args.compare_with}")
    scores, summary = score_pairs([(answer["predict"], answer["target"]) for answer in answers])
    if others is not None:
        comparison = {"other": args.compare_with} | paired_bootstrap(scores, [record["bleu"] for record in others])
    record = args.input_file.with_name(args.input_file.name + ".json")
    about = {
        "answers": sha256_of(args.input_file),
        "generation": read_record(args.input_file, record),
        "comparison": comparison,
    }
    about["versions"] = {name: version(name) for name in ("nltk", "sacrebleu", "jieba")}
    write_aside(files.scored, scored_text(answers, scores, summary["bleu"]))
    write_aside(files.records, records_text(answers, scores))
    draw_scores(answers, scores, files.picture)
    write_aside(files.summary, json.dumps(summary | about, ensure_ascii=False, indent=2) + "\n")
    print("\n".join(report_lines(summary, comparison)))
    print(f"written: {files.scored} {files.summary} {files.records} {files.picture}")


def report_lines(summary: dict[str, Any], comparison: dict[str, Any] | None) -> list[str]:
    """What a person reads at the end."""
    low, high = summary["bleu_bootstrap_95"]
    rows = [
        ["BLEU, mean of rows", f"{summary['bleu']:.4f}", f"95 % interval {low:.4f} to {high:.4f}"],
        ["with n + 1 rows", f"{summary['bleu_with_n_plus_1']:.4f}", "as the course's scripts count"],
        ["corpus BLEU", f"{summary['corpus_bleu']['score']:.4f}", summary["corpus_bleu"]["signature"]],
        ["sacrebleu zh", f"{summary['sacrebleu_zh']['score']:.4f}", summary["sacrebleu_zh"]["signature"]],
    ]
    for name in ("characters", "words"):
        scores = summary[f"rouge_{name}"]
        rows += [[f"{key.upper().replace('_', '-')} {name}", f"{value:.4f}", ""] for key, value in scores.items()]
    rows += [
        ["distinct-2", f"{summary['distinct']['2']:.4f}", ""],
        ["repetition", percent(summary["repetition"]), "of 4-grams stand in the same answer before"],
        ["length", percent(summary["length_ratio"]), "of the references' characters"],
        ["empty", percent(summary["empty"]), f"of {summary['rows']:,} answers"],
    ]
    lines = [f"{name:<20} {value:>8}  {remark}".rstrip() for name, value, remark in rows]
    if comparison:
        low, high = comparison["bootstrap_95"]
        word = "no difference beyond chance" if comparison["bootstrap_p"] >= SIGNIFICANT else "beyond chance"
        lines.append(
            f"difference to {comparison['other']}: {comparison['difference']:+.4f} ({low:+.4f} to {high:+.4f}), "
            f"paired bootstrap p = {comparison['bootstrap_p']:.3g}: {word}"
        )
    return lines


def main() -> None:
    """Answer if there are questions, then score."""
    args = parse_args()
    ScoreFiles(args.save_file)
    others = read_scores(args.compare_with) if args.compare_with else None
    if args.test_file:
        answer_questions(args, others)
    elif args.model_name_or_path or args.service_url:
        raise UserError(
            "a model needs --test_file, the questions to ask; without a model --input_file is scored alone."
        )
    score_answers(args, others)


if __name__ == "__main__":
    run_main(main)
