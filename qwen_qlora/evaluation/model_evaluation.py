"""Evaluate a base model, an adapter on it, or a merged model on a test file: `make qwen-eval`.

    python -m qwen_qlora.evaluation.model_evaluation --model_name_or_path DIR [--adapter_name_or_path DIR] \
        --test_file TEST.jsonl --result_file RESULT.csv --mode generate --limit 500 [--compare_with OTHER.jsonl]

Reads training rows: everything up to the last assistant turn is the prompt, that turn is the gold answer. Writes
RESULT.csv, RESULT.jsonl, RESULT_metrics.json and RESULT_confusion.png; RESULT.partial.jsonl holds the finished batches
of an interrupted run, which goes on where it was and ends with the same rows. A finished result with other settings
(model, adapter, mode, limit, test file) is kept under a name with their hash.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.countdown import Countdown
from finetune.errors import UserError, run_main
from finetune.flag_types import natural
from finetune.identity import adapter_fingerprint, check_adapter, fingerprint
from finetune.models import check_model_dir
from finetune.paired_scores import check_comparable
from finetune.partial_results import PartialResults, config_hash, sha256_of
from finetune.rows import read_rows
from qwen_qlora.evaluation.cases import EvaluationCase, cases_of, require_labels
from qwen_qlora.evaluation.results import (
    ResultFiles,
    asked,
    compare_records,
    make_record,
    read_metrics,
    read_records,
    report_lines,
    set_aside,
    summarise,
    take_back,
    write_metrics,
    write_records,
)

SPARE_TOKENS = 8  # generated beyond the longest gold answer: an answer that goes on is seen to go on
Work = Callable[[Sequence[Sequence[int]]], Iterable[list[tuple[int, Any]]]]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder of the base or merged model")
    parser.add_argument("--adapter_name_or_path", help="folder of a LoRA adapter trained on that model")
    parser.add_argument(
        "--load_in_4bit", action="store_true", help="NF4 weights, as in training (default: 16 bit, 32 on a CPU)"
    )
    parser.add_argument("--test_file", required=True, help="rows to evaluate on, .jsonl")
    parser.add_argument("--result_file", required=True, help="the .csv to write; the other files are named after it")
    parser.add_argument(
        "--mode",
        choices=("generate", "likelihood"),
        default="generate",
        help="greedy text, or the likelier of the two answers valid for the prompt (default: generate)",
    )
    parser.add_argument("--limit", type=natural, default=0, help="rows from the top of the file (default 0: all)")
    parser.add_argument("--token_budget", type=natural, default=0, help="tokens of one batch (0: by the device)")
    parser.add_argument("--compare_with", metavar="OTHER.jsonl", help="another result: McNemar's test between the two")
    return parser.parse_args()


def read_cases(args: argparse.Namespace) -> list[EvaluationCase]:
    """The test file's rows up to the limit. Raises UserError on a bad file, or one that likelihood mode can't score."""
    cases = cases_of(read_rows(args.test_file))[: args.limit or None]
    if args.mode == "likelihood":
        require_labels(cases, args.test_file)
    return cases


def run_config(args: argparse.Namespace, prompts: Sequence[Sequence[int]], budget: int, dtype: str) -> dict[str, Any]:
    """Everything that decides the result: equal configurations give equal rows."""
    import torch

    adapter = args.adapter_name_or_path
    return {
        "model": fingerprint(args.model_name_or_path),
        "adapter": adapter_fingerprint(adapter) if adapter else None,
        "load_in_4bit": args.load_in_4bit,
        "dtype": dtype,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "test_file": sha256_of(args.test_file),
        "prompts": config_hash({"token_ids": [list(prompt) for prompt in prompts]}),
        "mode": args.mode,
        "limit": args.limit,
        "token_budget": budget,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def plan_generation(
    model: Any, tokenizer: Any, prompts: list, cases: list, budget: int
) -> tuple[list[list[int]], Work]:
    """Batches of case indices, and the function that gives their answers."""
    from finetune.generate import generate_batches, plan_batches

    longest = max(len(tokenizer.encode(case.gold, add_special_tokens=False)) for case in cases)
    max_new_tokens = longest + SPARE_TOKENS
    batches = plan_batches([len(prompt) + max_new_tokens for prompt in prompts], budget)
    return batches, lambda todo: generate_batches(model, tokenizer, prompts, todo, max_new_tokens)


def plan_likelihood(
    model: Any, tokenizer: Any, prompts: list, cases: list, budget: int
) -> tuple[list[list[int]], Work]:
    """Batches of case indices, and the function that gives the log-likelihoods of both their valid answers."""
    from finetune.label_scores import candidate_ids, end_of_answer_id, plan_cases, score_batches

    end_id = end_of_answer_id(model, tokenizer)
    scored = [
        (prompt, [candidate_ids(tokenizer, text, end_id) for text in case.answers.texts()])
        for prompt, case in zip(prompts, cases, strict=True)
    ]
    return plan_cases(scored, budget), lambda todo: score_batches(model, tokenizer, scored, todo)


def compute(
    args: argparse.Namespace, cases: list, prompts: list, config: dict, files: ResultFiles
) -> tuple[dict[str, Any], PartialResults]:
    """Answer every case that is not in the partial file, write the records; returns how long it took, and that file.

    The caller removes it when the metrics are written.
    """
    from finetune.models import load_for_inference

    partial = PartialResults(files.partial, config)
    model, tokenizer = load_for_inference(
        args.model_name_or_path, args.adapter_name_or_path, args.load_in_4bit, config["dtype"]
    )
    plan = plan_generation if args.mode == "generate" else plan_likelihood
    batches, work = plan(model, tokenizer, prompts, cases, config["token_budget"])
    todo = [number for number in range(len(batches)) if number not in partial.batches]
    countdown = Countdown(len(cases), done=len(cases) - sum(len(batches[number]) for number in todo))
    if countdown.done:
        print(f"going on behind {countdown.done} of {len(cases)} rows", file=sys.stderr)
    for number, pairs in zip(todo, work([batches[number] for number in todo]), strict=True):
        partial.append(number, pairs)
        countdown.advance(len(pairs))
    results = dict(pair for pairs in partial.batches.values() for pair in pairs)
    set_aside(files)
    write_records(files, [make_record(case, results[index]) for index, case in enumerate(cases)])
    timing = {
        "rows_computed": countdown.done - countdown.first,
        "seconds": round(countdown.seconds, 3),
        "rows_per_second": round(countdown.rate, 3),
    }
    return timing, partial


def finish(args: argparse.Namespace, config: dict, files: ResultFiles, timing: dict[str, Any]) -> None:
    """Sum up the written records, compare them, draw the picture, write the metrics and print them."""
    from qwen_qlora.evaluation.confusion_plot import plot_confusion

    records = read_records(files.jsonl)
    metrics = {
        "model_name_or_path": args.model_name_or_path,
        "adapter_name_or_path": args.adapter_name_or_path,
        "test_file": args.test_file,
        "mode": args.mode,
        **summarise(records),
        "comparison": compare_records(records, args.compare_with) if args.compare_with else None,
        "config": config,
        "config_hash": config_hash(config),
        "timing": timing,
    }
    written = [files.csv, files.jsonl, files.metrics]
    if metrics["labels"]:
        # An adapter's folder is called final: the folder above it tells which.
        name = "/".join(Path(args.adapter_name_or_path or args.model_name_or_path).parts[-2:])
        title = f"{name}, {100 * metrics['accuracy']['value']:.1f} % of {len(records)}"
        plot_confusion(metrics["labels"]["confusion"], title, files.confusion)
        written.append(files.confusion)
    else:
        files.confusion.unlink(missing_ok=True)
    write_metrics(files, metrics)
    print("\n".join(report_lines(metrics)))
    print("written: " + " ".join(map(str, written)))


def main() -> None:
    """Evaluate, or say that it is done already."""
    args = parse_args()
    files, cases = ResultFiles(args.result_file), read_cases(args)
    model_dir = check_model_dir(args.model_name_or_path)
    if args.adapter_name_or_path:
        check_adapter(args.adapter_name_or_path, model_dir)

    import torch

    from finetune.conversation import encode_prompt
    from finetune.generate import default_token_budget
    from finetune.models import default_dtype, load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    prompts = [encode_prompt(tokenizer, list(case.messages)) for case in cases]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = run_config(args, prompts, args.token_budget or default_token_budget(device), default_dtype())
    if args.compare_with:
        if Path(args.compare_with).resolve() == files.jsonl.resolve():
            raise UserError(f"--compare_with {args.compare_with} is what this run writes. Name another --result_file.")
        rows, others, path = [asked(case) for case in cases], read_records(args.compare_with), Path(args.compare_with)
        check_comparable(rows, config, others, path, f"--compare_with {path}")
    done, partial = read_metrics(files), None
    if not done or done["config_hash"] != config_hash(config):
        take_back(files, config_hash(config))
        done = read_metrics(files)
    if done and done["config_hash"] == config_hash(config):
        print(f"already done: {files.csv}")
        timing = done["timing"]
    else:
        timing, partial = compute(args, cases, prompts, config, files)
    finish(args, config, files, timing)
    if partial:
        partial.remove()


if __name__ == "__main__":
    run_main(main)
