"""Stop a ZeRO training of two ranks and go on with it on one: what is saved, how long it takes, which losses follow.

    python -m benchmarks.interrupted FOLDER                # two cards, stage 3, four layers of Baichuan2-7B's shape
    python -m benchmarks.interrupted FOLDER --size tiny    # the same on two ranks of a CPU

Three trainings, started as llm_code/train_ft.sh starts them: one undisturbed; one that gets SIGTERM, as from
`make stop`, after --stop_after updates; and its second half on one rank, to which the checkpoint is dealt out anew.
FOLDER holds model, rows, logs, a checkpoint and final/: 20 bytes a parameter (layers: 16 GB).
"""

import argparse
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.train_plan import Run, all_runs, training_flags
from benchmarks.train_rows import write_rows
from benchmarks.train_runs import UPDATES_AN_EPOCH, command_of, environment_of, execute, model_dir
from finetune.errors import UserError, run_main
from finetune.report import write_json
from finetune.saving import newest_checkpoint, read_marker
from finetune.tables import markdown_table

STOPPED = 128 + signal.SIGTERM
LIMIT_S = 900.0
# Saved when it is stopped, and only then.
SAVING = ("--save_strategy", "steps", "--save_steps", "1000000")


class Stopper:
    """Sends SIGTERM when it reads that an update is done; `sent` is when, by time.monotonic()."""

    def __init__(self, after: int) -> None:
        self.start, self.sent = f"{after}/", 0.0

    def __call__(self, process: subprocess.Popen, line: str) -> None:
        """To be called with every line that the process prints."""
        if line.startswith(self.start) and not self.sent:
            self.sent = time.monotonic()
            process.send_signal(signal.SIGTERM)


def train(run: Run, folder: Path, output: str, stopper: Stopper | None = None) -> dict[str, Any]:
    """One training into folder/output; its report. Raises UserError when it ends otherwise than it should."""
    output_dir = folder / output
    rows = write_rows(folder / "rows", run.model, run.rows, UPDATES_AN_EPOCH * run.rows.per_update)
    flags = training_flags(run, str(model_dir(folder, run.model)), str(rows), str(output_dir))
    flags += SAVING if stopper else ()  # the others are only looked at for their losses
    log = folder / "logs" / f"{output}-{run.gpus}.log"
    ended = execute(command_of(run, flags), log, LIMIT_S, environment_of(run), stopper)
    expected = STOPPED if stopper else 0
    if ended.status != expected:
        raise UserError(f"{run.name}: expected to end with {expected}, ended with {ended.status}. Look in {log}.")
    return json.loads((output_dir / "train_report.json").read_text(encoding="utf-8"))


def losses_of(report: dict[str, Any]) -> list[float]:
    """Of all updates, in order."""
    return [entry["loss"] for entry in report["history"] if "loss" in entry]


def measure(run: Run, folder: Path, stop_after: int) -> dict[str, Any]:
    """The three trainings and what is found between them."""
    for output in ("undisturbed", "stopped"):
        shutil.rmtree(folder / output, ignore_errors=True)
    undisturbed = losses_of(train(run, folder, "undisturbed"))
    shutil.rmtree(folder / "undisturbed" / "final")
    stopper = Stopper(stop_after)
    train(run, folder, "stopped", stopper)
    seconds_to_end = time.monotonic() - stopper.sent
    checkpoint, _ = newest_checkpoint(folder / "stopped")
    if checkpoint is None:
        raise UserError(f"{folder / 'stopped'}: expected a checkpoint after SIGTERM, found none.")
    marker = read_marker(checkpoint)
    found = {
        "run": run.name,
        "saved_at_update": marker["step"],
        "ranks_of_states": len(list(checkpoint.rglob("*_optim_states.pt"))),
        "checkpoint_gb": round(sum(path.stat().st_size for path in checkpoint.rglob("*")) / 1e9, 2),
        "seconds_from_sigterm_to_end": round(seconds_to_end, 1),
    }
    started = time.monotonic()
    gone_on = train(replace(run, gpus=1), folder, "stopped")
    found["seconds_of_the_rest"] = round(time.monotonic() - started, 1)
    found["starts"] = gone_on["starts"]
    return found | {"undisturbed": undisturbed, "stopped": losses_of(gone_on)}


def page(found: dict[str, Any]) -> str:
    """Markdown: what was found, and the losses beside each other."""
    pairs = list(zip(found["undisturbed"], found["stopped"], strict=True))
    number = found["saved_at_update"]
    apart = [max(abs(a - b) for a, b in part) for part in (pairs[:number], pairs[number:])]
    saved = f"the states of {found['ranks_of_states']} ranks ({found['checkpoint_gb']:.1f} GB)"
    text = (
        f"{found['run']} of {found['model']}, {found['device']}: SIGTERM saved {saved} after update {number}, "
        f"{found['seconds_from_sigterm_to_end']:.0f} s from the signal to the end. One rank did the rest in "
        f"{found['seconds_of_the_rest']:.0f} s, start included. Losses differ by at most {apart[0]:.1e} "
        f"until then, {apart[1]:.1e} afterwards."
    )
    rows = [(str(step), f"{a:.4f}", f"{b:.4f}") for step, (a, b) in enumerate(pairs, 1)]
    return "\n".join([text, "", *markdown_table(("update", "undisturbed", "stopped, rest on one rank"), rows), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["real", "tiny"], default="real", help="[%(default)s]")
    parser.add_argument("--stage", choices=["1", "2", "3"], default="3", help="of ZeRO [%(default)s]")
    parser.add_argument("--updates", type=int, default=12, help="[%(default)s]")
    parser.add_argument("--stop_after", type=int, default=5, help="updates [%(default)s]")
    flags = parser.parse_args(arguments)
    if not 0 < flags.stop_after < flags.updates - 1:
        raise UserError(f"--stop_after must leave updates to do, got {flags.stop_after} of {flags.updates}.")
    run = replace(all_runs(flags.size == "tiny")[f"zero-{flags.stage}-x2"], updates=flags.updates)
    if flags.size == "real":
        run = replace(run, model="baichuan2-7b-layers")
    folder = flags.folder.absolute()  # the trainings are started in the repository
    folder.mkdir(parents=True, exist_ok=True)
    where = machine.measure()
    found = measure(run, folder, flags.stop_after) | {"model": run.model, **where}
    write_json(folder / "interrupted.json", found)
    text = page(found)
    (folder / "interrupted.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
