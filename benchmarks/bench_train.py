"""Measure training: ours through the shipped commands and other ways on the same rows of the same updates.

    python -m benchmarks.bench_train FOLDER                         # on one card: models of random weights are made
    python -m benchmarks.bench_train FOLDER --size tiny             # the same on a CPU, in a minute
    python -m benchmarks.bench_train FOLDER --list                  # names and commands of the runs, nothing is run
    python -m benchmarks.bench_train FOLDER --only qlora,padded-16 --rounds 3 --resume
    python -m benchmarks.bench_train FOLDER --group length          # how speed changes with one quantity
    python -m benchmarks.bench_train FOLDER --group losses          # SmolLM2 on real rows
    python -m benchmarks.bench_train FOLDER --group "losses in float32"  # do all compute the same?
    python -m benchmarks.bench_train FOLDER --group cards           # one card and two, QLoRA and ZeRO's stages
    python -m benchmarks.bench_train FOLDER --only qlora --label 4k --tokens_per_micro_batch 4096

Flags it does not know go to training. Rounds are interleaved: every run once, then every run again. A peer that is not
installed or fails is named in the table. FOLDER holds models, rows and logs (14B: 28 GB, 7B: 15 GB); results.jsonl has
a line a run, table.md and bench_train.png are made of it. The first three updates warm up and do not count.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.train_plan import WARM_UP, Run, all_runs, chosen
from benchmarks.train_runs import command_of, measure
from benchmarks.train_table import CARDS, EXACT, draw, table
from finetune.errors import UserError, run_main

DEFAULT_FOLDER = Path("outputs/bench_train")
GROUPS = (*EXACT, "rows", "length", "rank", "size", CARDS)


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(flags, flags for training). FOLDER comes first: anywhere else it could be the value of an unknown flag."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    folder = Path(words.pop(0)) if words and not words[0].startswith("-") else DEFAULT_FOLDER
    parser = argparse.ArgumentParser(
        usage=f"python -m benchmarks.bench_train [FOLDER, else {DEFAULT_FOLDER}] [flags] [flags of training]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(folder=folder)
    parser.add_argument("--size", choices=["real", "tiny"], help="of the models [real where there is a card]")
    parser.add_argument("--list", action="store_true", help="print the runs and end")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these runs")
    parser.add_argument("--group", action="append", choices=GROUPS, default=[], help="may be repeated")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--updates", type=int, help="of every run")
    parser.add_argument("--label", default="", help="stands behind the names of the results, where flags differ")
    parser.add_argument("--resume", action="store_true", help="skip runs that are done in results.jsonl")
    parser.add_argument("--results", type=Path, help="where results, table and picture go [FOLDER]")
    parser.add_argument("--limit_s", type=float, default=900, help="seconds after which a run is killed")
    return parser.parse_known_args(words)


def runs_of(flags: argparse.Namespace) -> list[Run]:
    """What the command line asks for. Raises UserError for an unknown name."""
    runs = chosen(all_runs(flags.size == "tiny"), list(filter(None, flags.only.split(","))), flags.group)
    if flags.updates is not None:
        runs = [replace(run, updates=flags.updates) for run in runs]
    return [replace(run, name="+".join(filter(None, (run.name, flags.label)))) for run in runs]


def read_results(path: Path) -> list[dict[str, Any]]:
    """Lines of results.jsonl, none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags, more = parse(arguments)
    if flags.size is None:
        import torch

        flags.size = "real" if torch.cuda.is_available() else "tiny"
    runs = runs_of(flags)
    if flags.list:
        for run in runs if flags.only or flags.group else all_runs(flags.size == "tiny").values():
            print(f"{run.name:16} {run.group:15} {run.model:14} {' '.join(command_of(run, run.flags)[2:])}")
        return
    if flags.updates is not None and flags.updates <= WARM_UP:
        raise UserError(f"--updates must be more than the {WARM_UP} that warm up, got {flags.updates}.")
    if flags.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {flags.rounds}.")
    flags.folder = flags.folder.absolute()  # the runs are started in the repository
    flags.folder.mkdir(parents=True, exist_ok=True)
    results = flags.results or flags.folder
    results.mkdir(parents=True, exist_ok=True)
    run_all(runs, flags, more, results / "results.jsonl")
    everything = read_results(results / "results.jsonl")
    text = table(everything)
    (results / "table.md").write_text(text, encoding="utf-8")
    draw(everything, results / "bench_train.png")
    print(text)


def run_all(runs: list[Run], flags: argparse.Namespace, more: list[str], path: Path) -> None:
    """Append a line a run to `path`; a run that failed stops no other."""
    done = {(line["name"], line["round"]) for line in read_results(path) if line["status"] == "done"}
    wanted = [(number, run) for number in range(1, flags.rounds + 1) for run in runs]
    if flags.resume:
        wanted = [(number, run) for number, run in wanted if (run.name, number) not in done]
    if not wanted:
        return
    where = machine.measure()
    for number, run in wanted:
        print(f"-----> {run.name}, round {number} of {flags.rounds}", file=sys.stderr, flush=True)
        result = {"round": number, **measure(run, flags.folder, more, flags.limit_s), **where}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        said = f"{result['tokens_per_second']:,.0f} tokens/s" if result["status"] == "done" else result["status"]
        print(f"       {run.name}: {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
