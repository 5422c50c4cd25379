"""The part that both evaluations share: command-line flags of the model, and a run that can be killed and resumed."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from finetune.countdown import Countdown
from finetune.errors import UserError
from finetune.flag_types import natural, positive
from finetune.partial_results import PartialResults
from llm_code.llm_evaluation.answering import Answerer, Decoding, Generation, Likelihood, LocalModel, Prompt
from llm_code.module_interface.addresses import server_url

SETTINGS = ("answer", "limit", "ntrain", "max_new_tokens", "temperature", "load_in_4bit")


def add_model_flags(parser: argparse.ArgumentParser, ways: Sequence[str], max_new_tokens: int) -> None:
    """Flags that say which model answers, and how."""
    parser.add_argument("--model_name_or_path", "--base_model_path", help="checkpoint in a current layout")
    parser.add_argument("--adapter_name_or_path", help="LoRA adapter on that checkpoint")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (default: 16 bit, 32 on a CPU)")
    parser.add_argument("--answer", choices=ways, default="generate", help="way to answer (default: generate)")
    parser.add_argument(
        "--service_url", type=server_url, help="address for --answer service, such as http://127.0.0.1:10820"
    )
    parser.add_argument("--concurrency", type=positive, default=16, help="requests to the service at a time (16)")
    parser.add_argument(
        "--max_new_tokens",
        type=positive,
        default=max_new_tokens,
        help=f"tokens of an answer ({max_new_tokens})",
    )
    parser.add_argument("--batch_size", type=positive, default=256, help="rows of one batch at most (default: 256)")
    parser.add_argument("--token_budget", type=natural, default=0, help="tokens of one batch (0: by the device)")


def make_answerer(args: argparse.Namespace, decoding: Decoding, labels: Sequence[str] = ()) -> Answerer:
    """The answerer that the flags name. Raises UserError when something it needs is missing."""
    if args.answer == "service":
        from llm_code.llm_evaluation.service_answerer import Service

        if not args.service_url:
            raise UserError("--answer service needs --service_url, such as http://127.0.0.1:10820.")
        return Service(args.service_url, decoding, args.concurrency)
    if not args.model_name_or_path:
        raise UserError("expected --model_name_or_path, the checkpoint to ask, or --answer service --service_url URL.")
    model = LocalModel(
        args.model_name_or_path, args.adapter_name_or_path, args.load_in_4bit, args.token_budget, args.batch_size
    )
    if args.answer == "engine":
        from llm_code.llm_evaluation.engine_answerer import EngineAnswers

        return EngineAnswers(model, decoding)
    return Likelihood(model, labels) if args.answer == "likelihood" else Generation(model, decoding)


def standing_config(about: Path, partial: Path) -> dict[str, Any] | None:
    """The configuration of the run whose results lie there, finished (`about` tells) or not; None for none."""
    try:
        if about.exists():
            return json.loads(about.read_text(encoding="utf-8"))["config"]
        with open(partial, encoding="utf-8") as stream:
            return json.loads(stream.readline())["config"]
    except (OSError, ValueError, KeyError):
        return None


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What was asked and how, without the model: a run of another model with the same settings takes the old place."""
    keys = [*SETTINGS, "top_p", "seed"] if config.get("temperature") else SETTINGS
    return {key: config[key] for key in keys if config.get(key)}


def place_beside(standing: dict[str, Any] | None, config: dict[str, Any]) -> str:
    """Name of the folder for a run that must not replace the one that stands there, empty where it may.

    It may take the place of a run with the same settings, of other weights; one of all questions also that of some. A
    finished one whose place is taken is kept under another name (set_aside).
    """
    if standing is None or settings_of(standing) == settings_of(config):
        return ""
    if standing.get("limit") and not config.get("limit"):
        return ""
    return "_".join(f"{key}_{value}" for key, value in settings_of(config).items())


def kept_tag(about: dict[str, Any], place: Callable[[str], Path]) -> str:
    """What the name of a finished result gets when it is set aside: -HASH of its settings, by which place() is free.

    Where its weights are not known the same settings may have given another result before: then -HASH-2 and so on.
    """
    tag = f"-{about['config_hash'][:8]}"
    if may_reuse(about["config"]):
        return tag
    return next(one for one in chain([tag], (f"{tag}-{number}" for number in count(2))) if not place(one).exists())


def set_aside(moves: Iterable[tuple[Path, Path]], kept: Path) -> None:
    """Rename the files of a finished result, of other weights, that a new one is about to replace."""
    for path, place in moves:
        if path.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    print(f"kept: {kept}, the result of other weights or settings that stood there", file=sys.stderr)


def may_reuse(config: dict[str, Any]) -> bool:
    """Whether finished results are of the same model for sure: a service may not tell which weights it serves."""
    return config.get("weights", "known") is not None


def collect(
    answerer: Answerer, prompts: Sequence[Prompt], path: Path, config: dict[str, Any]
) -> tuple[list[str], dict[str, Any], PartialResults]:
    """Answers to all prompts, how long they took, and the open partial file.

    Finished batches lie in the file at `path`; those of an earlier run with the same configuration are taken over. The
    caller removes the file when the answers have reached their final place.
    """
    partial = PartialResults(path, config)
    batches = answerer.plan(prompts)
    todo = {min(batch): batch for batch in batches if min(batch) not in partial.batches}
    countdown = Countdown(len(prompts), done=len(prompts) - sum(map(len, todo.values())), unit="questions")
    if countdown.done:
        print(f"going on behind {countdown.done} of {len(prompts)} questions", file=sys.stderr)
    for pairs in answerer.answer(prompts, list(todo.values())):
        partial.append(min(number for number, _ in pairs), pairs)
        countdown.advance(len(pairs))
    answers = dict(pair for pairs in partial.batches.values() for pair in pairs)
    timing = {
        "questions": len(prompts),
        "questions_computed": countdown.done - countdown.first,
        "seconds": round(countdown.seconds, 3),
        "questions_per_second": round(countdown.rate, 3),
    }
    return [answers[number] for number in range(len(prompts))], timing, partial
