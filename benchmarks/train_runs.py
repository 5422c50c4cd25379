"""One run of benchmarks.bench_train: a process of its own, and what its report says."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

from benchmarks.data_speed import measure_rows
from benchmarks.machine import REPOSITORY
from benchmarks.ranks import training_command
from benchmarks.train_plan import OURS, TRAINED, WARM_UP, Run, training_flags
from benchmarks.train_rows import write_rows
from finetune.arguments import parse_arguments
from finetune.memory import Shape, shape_of_config
from finetune.speed import full_flops_per_token, qlora_flops_per_token

NEEDED = {"padded": ("peft", "bitsandbytes"), "unsloth": ("unsloth",), "float32": ("peft", "bitsandbytes"), None: ()}
UPDATES_AN_EPOCH = 32
LOSSES_KEPT = 20  # of the first updates
LINES_SHOWN = 12
SAME_FOR_ALL = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # our training sets it, so peers have it too
LOADING = ("loading ", "plan: ")  # how the lines before and after the loading of a model begin


@dataclass(frozen=True)
class Ended:
    """A process: its status, its lines, and seconds from its start to its end and to the lines that are looked for."""

    status: int
    lines: list[str]
    seconds: dict[str, float]

    @property
    def loading(self) -> float | None:
        """Seconds between the two lines that stand around the loading of the model."""
        first, second = (self.seconds.get(start) for start in LOADING)
        return None if first is None or second is None else round(second - first, 1)


def measure(run: Run, folder: Path, more: Sequence[str], limit_s: float) -> dict[str, Any]:
    """The result of a run: its numbers, or under `status` why there are none."""
    result = {name: getattr(run, name) for name in ("name", "group", "value", "model", "peer", "gpus")}
    result["rows_per_update"] = run.rows.per_update
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    if run.method == "rows":
        return {**result, "status": "done", **measure_rows(folder, run.model, run.rows, int(run.value))}
    missing = [name for name in NEEDED[run.peer] if importlib.util.find_spec(name) is None]
    if missing:
        return {**result, "status": f"{missing[0]} is not installed"}
    try:
        model = model_dir(folder, run.model)
    except subprocess.CalledProcessError as error:
        return {**result, "status": _last(error.stderr.splitlines())}
    rows = run.train_file or write_rows(folder / "rows", run.model, run.rows, UPDATES_AN_EPOCH * run.rows.per_update)
    output_dir = folder / "output" / run.name
    shutil.rmtree(output_dir, ignore_errors=True)
    flags = [*training_flags(run, str(model), str(rows), str(output_dir)), *more]
    command = command_of(run, flags)
    ended = execute(command, folder / "logs" / f"{run.name}.log", limit_s, environment_of(run))
    shutil.rmtree(output_dir / "final", ignore_errors=True)  # as large as the model in full fine-tuning
    result["command"] = " ".join(command[1:]).replace(sys.executable, "python")
    report = output_dir / "train_report.json"
    if ended.status or not report.exists():
        print("\n".join(ended.lines[-LINES_SHOWN:]), file=sys.stderr)
        return {**result, "status": _last(ended.lines) or f"ended with {ended.status}"}
    shape = shape_of_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    numbers = numbers_of(run, shape, json.loads(report.read_text(encoding="utf-8")), flags)
    return {**result, "status": "done", **numbers, "seconds": ended.seconds["end"], "seconds_to_load": ended.loading}


def model_dir(folder: Path, model: str) -> Path:
    """The model, made by a process of its own: one that has used a card keeps some of its memory."""
    target = folder / "models" / model
    program, last = ["benchmarks.random_model", str(target), model], "conversion.json"
    if model == TRAINED:
        program, last = ["benchmarks.smollm2", str(target)], "config.json"
    if not (target / last).exists():  # the file that is written when the rest is there
        command = [sys.executable, "-m", *program]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr)
    return target


def command_of(run: Run, flags: Sequence[str]) -> list[str]:
    """The process of a run, or for `rows` the module: that takes no flags."""
    if run.method == "rows":
        return [sys.executable, "-m", "benchmarks.data_speed"]
    words = ["benchmarks.train_peer", run.peer, *run.peer_options] if run.peer else [OURS[run.method][0]]
    if run.exact:
        words.insert(0, "benchmarks.train_exact")
    return [*training_command(words[0], run.gpus, run.stage != "none"), *words[1:], *flags]


def environment_of(run: Run) -> dict[str, str]:
    """A process without a launcher sees one card; DeepSpeed's hides cards from its ranks itself."""
    shown = {"CUDA_VISIBLE_DEVICES": "0"} if run.gpus == 1 and run.stage == "none" else {}
    # DeepSpeed looks for the ninja that lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shown | SAME_FOR_ALL | os.environ | {"PATH": path}


def execute(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[subprocess.Popen, str], None] | None = None,
) -> Ended:
    """Run to the end, or to the limit; what it prints goes to the log, and line by line to `watch`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines, seconds, started = [], {}, time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment or SAME_FOR_ALL | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    timer = Timer(limit_s, process.kill)
    timer.start()
    with open(log, "w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            lines.append(line.rstrip())
            for start in LOADING:
                if line.startswith(start):
                    seconds.setdefault(start, time.monotonic() - started)
            if watch:
                watch(process, line)
    status = process.wait()
    seconds["end"] = round(time.monotonic() - started, 1)
    if not timer.is_alive():
        lines.append(f"killed after {limit_s:.0f} s")
    timer.cancel()
    return Ended(status, lines, seconds)


def numbers_of(run: Run, shape: Shape, report: dict[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """What the report says about speed, memory and losses."""
    history = [entry for entry in report["history"] if "loss" in entry]
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry][WARM_UP:]
    # The median, so that a kernel compiled late counts against nobody.
    speed = median(speeds) if speeds else None
    losses = [entry["loss"] for entry in history]
    return {
        "tokens_per_second": speed and round(speed, 1),
        "tflops": speed and round(speed * flops_per_token(run, shape, flags) / 1e12, 4),
        "peak_memory_gib": report["peak_memory_gib"],
        "predicted": report.get("predicted", {}),
        "token_budget": report.get("token_budget"),
        "layers_kept": report.get("layers_not_recomputed"),
        "updates": len(history),
        "losses": losses[:LOSSES_KEPT],
        "grad_norms": [entry.get("grad_norm") for entry in history[:LOSSES_KEPT]],
        "last_loss": losses[-1] if losses else None,
        "speeds": [round(value, 1) for value in speeds],
    }


def flops_per_token(run: Run, shape: Shape, flags: Sequence[str]) -> float:
    """FLOP of a trained token that any way must compute: recomputation and padding are not counted."""
    if run.method == "full":
        return full_flops_per_token(shape)
    return qlora_flops_per_token(shape, parse_arguments(_known(flags)).lora.lora_rank)


def _known(flags: Sequence[str]) -> list[str]:
    """Of the flags those that say the rank."""
    ranks = [index for index, word in enumerate(flags) if word == "--lora_rank"]
    return list(flags[ranks[-1] : ranks[-1] + 2]) if ranks else []


def _last(lines: Sequence[str]) -> str:
    """The last line that says something, without `error: `."""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("error: ")[:300] if said else ""
