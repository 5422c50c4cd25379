"""The whole path with a tiny model on this machine: install, convert, check, train, evaluate, merge, compare.

    python3 scripts/quickstart.py      # make quickstart

Drives the same make targets as a real run, with the settings of a tiny model in place of `.env`'s. Writes everything to
outputs/quickstart; an interrupted run continues there, a finished one is done again from the start. Exit 1 when the
fine-tuned model answers fewer than GOAL of the held-out rows right.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import settings  # noqa: E402
from scripts.environment import ensure  # noqa: E402
from scripts.nvidia import find_cards  # noqa: E402
from scripts.package_install import EnvironmentFailed  # noqa: E402

OUTPUT = ROOT / "outputs" / "quickstart"
GOAL = 0.90
PLACES = {
    "ENVS_DIR": OUTPUT / "envs",
    "QWEN_MODEL_DIR": OUTPUT / "model",
    "QWEN_TRAIN_CONFIG": ROOT / "qwen_qlora" / "config" / "tiny-qlora.json",
    "QWEN_TRAIN_FILE": ROOT / "qwen_qlora" / "data" / "text_matching_data_train.jsonl",
    "QWEN_TEST_FILE": ROOT / "qwen_qlora" / "data" / "text_matching_data_test.jsonl",
    "QWEN_OUTPUT_DIR": OUTPUT / "train",
    "QWEN_ADAPTER_DIR": OUTPUT / "train" / "final",
    "QWEN_MERGED_DIR": OUTPUT / "merged",
    "QWEN_BASE_RESULT_FILE": OUTPUT / "base.csv",
    "EVAL_RESULT_DIR": OUTPUT,
}
MODELS = ("base", "adapter", "merged")


class StepFailed(RuntimeError):
    """A step of the path ended with another status than 0, which it carries."""


def step_environment() -> dict[str, str]:
    """The settings of the tiny run; they beat those of `.env`. What this make was told is not told to the steps."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    variables.update({key: str(place) for key, place in PLACES.items()})
    variables.update(QWEN_EVAL_MODE="likelihood", QWEN_EVAL_LIMIT="", PRICE_PER_HOUR="")
    return variables


def run(command: list[str], variables: dict[str, str]) -> None:
    """Run one step in front; raises StepFailed when it fails."""
    print(f"\n-----> {shlex.join(command)}", file=sys.stderr, flush=True)
    status = subprocess.run(command, cwd=ROOT, env=variables).returncode
    if status:
        raise StepFailed(status, f"quickstart stopped at: {shlex.join(command)}. The same command continues.")


def result_file(model: str) -> Path:
    return OUTPUT / f"{model}.csv"


def evaluate(model: str, variables: dict[str, str]) -> None:
    """Evaluate one of MODELS; the fine-tuned ones are compared with the base row by row."""
    chosen = [f"QWEN_EVAL_MODEL={model}", f"QWEN_RESULT_FILE={result_file(model)}"]
    compare = [] if model == "base" else [f"ARGS=--compare_with {shlex.quote(str(OUTPUT / 'base.jsonl'))}"]
    run(["make", "qwen-eval", *chosen, *compare], variables)


def link_environments(folder: Path) -> None:
    """Let the steps find `.venv` under the names they ask for: a tiny run needs one environment, not two."""
    PLACES["ENVS_DIR"].mkdir(parents=True, exist_ok=True)
    for name in ("qwen_env", "modelscope_env"):
        link = PLACES["ENVS_DIR"] / name
        link.unlink(missing_ok=True)
        link.symlink_to(folder)


def sees_card(python: str) -> bool:
    """Whether torch sees a card: with an old driver it does not, and steps refuse the processor unless told."""
    test = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([python, "-c", test], stderr=subprocess.DEVNULL).returncode == 0


def measure(folder: Path) -> None:
    """Every step of the path after the installation."""
    python, variables = str(folder / "bin" / "python"), step_environment()
    if find_cards() and not sees_card(python):
        variables["CUDA_VISIBLE_DEVICES"] = "-1"  # the tiny model is meant for the processor too
    run([python, "-m", "finetune.checkpoint", "tests/tiny/pretrained", str(PLACES["QWEN_MODEL_DIR"])], variables)
    run(["make", "qwen-data"], variables)
    evaluate("base", variables)
    run(["make", "qwen-train"], variables)
    evaluate("adapter", variables)
    run(["make", "qwen-report"], {**variables, "QWEN_RESULT_FILE": str(result_file("adapter"))})
    run(["make", "qwen-merge"], variables)
    evaluate("merged", variables)


def baseline(folder: Path) -> str:
    """The line of the bag-of-characters baseline."""
    command = [str(folder / "bin" / "python"), "-m", "qwen_qlora.data.baseline"]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.decode().strip()


def report(folder: Path, seconds: float) -> int:
    """Print the table and the paths of the pictures; the exit status says whether the goal is reached."""
    metrics = {model: json.loads((OUTPUT / f"{model}_metrics.json").read_text(encoding="utf-8")) for model in MODELS}
    print(f"\n{'model':<10}{'accuracy':>9}   {'95 % interval':<16}{'F1 same':>9}{'F1 different':>14}{'rows/s':>9}")
    for model, found in metrics.items():
        low, high = (100 * bound for bound in found["accuracy"]["wilson_95"])
        f1 = {name: scores["f1"] for name, scores in found["labels"]["by_class"].items()}
        print(
            f"{model:<10}{100 * found['accuracy']['value']:>7.1f} %   {f'{low:.1f} to {high:.1f} %':<16}"
            f"{f1['same']:>9.3f}{f1['different']:>14.3f}{found['timing']['rows_per_second']:>9.0f}"
        )
    print(baseline(folder))
    for picture in [OUTPUT / "train" / "loss.png", *(OUTPUT / f"{model}_confusion.png" for model in MODELS)]:
        print(f"picture: {picture.relative_to(ROOT)}")
    print(f"page: {(OUTPUT / 'qwen_report' / 'report.html').relative_to(ROOT)}")
    print(f"after the installation {seconds:.0f} s; everything is in {OUTPUT.relative_to(ROOT)}")
    worst = min(metrics[model]["accuracy"]["value"] for model in ("adapter", "merged"))
    if worst < GOAL:
        print(f"error: expected at least {GOAL:.0%} after fine-tuning, found {worst:.1%}.", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        settings.load()
        folder = ensure(".venv")
        finished = OUTPUT / "finished"
        if finished.exists():
            shutil.rmtree(OUTPUT)
        link_environments(folder)
        started = time.monotonic()
        measure(folder)
        status = report(folder, time.monotonic() - started)
        finished.touch()
        return status
    except (EnvironmentFailed, settings.SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StepFailed as error:
        status, text = error.args
        print(f"error: {text}", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
