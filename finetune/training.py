"""One training run from its arguments to final/: what both projects' entry points do.

Reads the base model's folder and the rows; writes OUTPUT_DIR/{checkpoint-N, final, runs, loss.png, train_report.json}.
Everything that can be refused is refused before the model is loaded.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import prepare, saving
from finetune.arguments import Arguments, require
from finetune.damaged import check_undamaged
from finetune.errors import UserError
from finetune.gpus import price_per_hour
from finetune.memory import shape_of_config, total
from finetune.plan_options import warmup_note
from finetune.prepare import is_first_rank, say
from finetune.room import Method, Room, check_saving, decide_budget, measure_room, predicted_parts, predicted_peak
from finetune.rows import read_rows
from finetune.speed import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from finetune.conversation import Sample
    from finetune.trainer import UpdateTrainer

GIB = 2**30


@dataclass(frozen=True)
class Run:
    """A run that is about to begin: everything but the trainer."""

    arguments: Arguments
    method: Method
    identity: dict[str, Any]
    names: dict[str, str]
    tokenizer: "PreTrainedTokenizerBase"
    samples: "Sequence[Sample]"
    room: Room
    budget: Budget
    last_update: int
    largest: dict[int, int] = field(default_factory=dict)  # UpdateDataset.largest_micro_batches, known with the trainer

    @property
    def parts(self) -> dict[str, float]:
        """Bytes that it should take of a card, by part."""
        return predicted_parts(self.method, self.room, self.budget.layers_kept, self.largest)

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.arguments.train.output_dir)


def run_training(arguments: Arguments, method: Method) -> int:
    """Train and return the exit status: 0 done (now or before), 143 or 130 stopped by a signal and saved.

    Raises UserError for whatever the person can mend.
    """
    # Before torch is imported: against fragmentation, which grows with micro-batches of changing size.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for notice in arguments.notices:
        say(f"note: {notice}")
    _check_inputs(arguments)
    identity, names = prepare.run_identity(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    output_dir = Path(arguments.train.output_dir)
    prepare.check_output_dir(output_dir)
    saving.check_nothing_foreign(output_dir)
    saving.check_same_run(output_dir, identity, names)
    saving.check_same_stage(output_dir, method.stage)
    finished = saving.read_marker(output_dir / "final")
    if (
        finished
        and prepare.updates_in_all(arguments, finished["rows"], identity["rows_per_update"]) <= finished["step"]
    ):
        if is_first_rank():
            done = f"already done: {output_dir / 'final'} ({finished['step']} updates)."
            print(f"{done} Remove it or name another --output_dir to train again.")
        return 0
    check_undamaged(output_dir, method.stage)
    return _train(arguments, method, identity, names)


def _check_inputs(arguments: Arguments) -> None:
    from finetune.models import check_model_dir

    require(
        arguments,
        model_name_or_path="Set it in the JSON file or pass --model_name_or_path.",
        train_file="Set it in the JSON file or pass --train_file.",
        output_dir="Set it in the JSON file or pass --output_dir.",
    )
    check_model_dir(arguments.model.model_name_or_path)
    train = arguments.train
    if train.max_steps <= 0 and train.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs: expected a number above 0, found {train.num_train_epochs:g}.")
    price_per_hour()
    for path in filter(None, (arguments.data.train_file, arguments.data.eval_file)):
        read_rows(path)


def _train(arguments: Arguments, method: Method, identity: dict[str, Any], names: dict[str, str]) -> int:
    import torch
    from transformers import set_seed

    from finetune.models import load_tokenizer
    from finetune.qlora import checkpoint_layers

    prepare.quieten()
    dtype = prepare.compute_dtype(arguments.train.bf16)
    prepare.explain_choices(arguments, dtype)
    args = prepare.training_arguments(arguments, dtype)
    prepare.check_shared_folder(args.output_dir)
    model_dir = Path(arguments.model.model_name_or_path)
    tokenizer = load_tokenizer(model_dir)
    samples, evaluation = prepare.load_samples(arguments, tokenizer)
    set_seed(args.seed)
    say(f"loading {model_dir}")
    model = method.load(arguments, getattr(torch, dtype), args.device)
    shape = shape_of_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    per_update, width = identity["rows_per_update"], getattr(torch, dtype).itemsize
    room = measure_room(arguments, shape, model, samples, args.world_size, per_update, width)
    budget = decide_budget(method, room)
    prepare.on_first_rank(lambda: _check_saving(args.output_dir, method, room, bool(evaluation)))
    checkpoint_layers(model, shape.layers - budget.layers_kept)
    last_update = prepare.updates_in_all(arguments, len(samples), per_update)
    run = Run(arguments, method, identity, names, tokenizer, samples, room, budget, last_update)
    optimizer = method.optimizer(arguments, getattr(torch, dtype))
    trainer = _build_trainer(run, args, model, evaluation, optimizer)
    run = replace(run, largest=trainer.train_dataset.largest_micro_batches(max(1, last_update)))
    _print_plan(run, trainer)
    return _run(run, trainer)


def _check_saving(output_dir: str, method: Method, room: Room, has_best: bool) -> None:
    saving.clear_aside(output_dir)  # what a kill left there must not count as used disk
    check_saving(method, room, has_best)


def _build_trainer(
    run: Run,
    args: "TrainingArguments",
    model: Any,
    evaluation: list["Sample"],
    optimizer: tuple[type, dict[str, Any]] | None,
) -> "UpdateTrainer":
    from transformers.trainer_callback import PrinterCallback

    from finetune.checkpointing import RunPlan
    from finetune.progress import Meter, ProgressCallback
    from finetune.report import write_json
    from finetune.trainer import UpdateTrainer

    def finish_folder(folder: Path) -> None:
        write_json(folder / "train_args.json", run.arguments.as_dict())
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
        if folder.name == "final":
            run.tokenizer.save_pretrained(folder)

    plan = RunPlan(
        rows_per_update=run.identity["rows_per_update"],
        token_budget=run.budget.tokens,
        identity=run.identity,
        names=run.names,
        record={
            "rows": len(run.samples),
            "updates_planned": run.last_update,
            "stage": run.method.stage,
            "ranks": run.room.world_size,
            **run.method.record,
        },
        save_total_limit=run.arguments.train.save_total_limit,
        finish_folder=finish_folder,
        finish_final=run.method.finish_final,
        eval_samples=evaluation,
    )
    gpu, price = run.room.gpu, price_per_hour()
    peak = gpu.peak_tflops * 1e12 * run.room.world_size if gpu else None
    meter = Meter(run.method.flops_per_token(run.room), peak, price)
    trainer = UpdateTrainer(
        model=model,
        args=args,
        samples=run.samples,
        plan=plan,
        meter=meter,
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(trainer, meter))
    return trainer


def _estimated_speed(run: Run) -> float | None:
    """Tokens per second of all cards, None where the card is not known."""
    room = run.room
    return run.method.tokens_per_second(room, run.budget) * room.world_size if room.gpu else None


def _print_plan(run: Run, trainer: "UpdateTrainer") -> None:
    from finetune.progress import clock, decoded_sample, size_text

    data, room, rows = trainer.train_dataset, run.room, len(run.samples)
    epochs, rest = divmod(run.last_update, len(data))
    tokens = epochs * sum(data.lengths) + rest * room.tokens_per_update  # an epoch's last update may be smaller
    mean, supervised = sum(data.lengths) / rows, sum(data.supervised) / sum(data.lengths)
    updates = f"{run.last_update:,} updates of {trainer.plan.rows_per_update} rows, {tokens:,.0f} tokens"
    say(f"plan: {rows:,} rows of {mean:.0f} tokens on average ({supervised:.0%} supervised), {updates}")
    if note := warmup_note(run.arguments.train, run.last_update):
        say(f"  {note}")
    say(f"  trained: {room.trainable:,} parameters of {room.shape.parameters:,} ({run.method.name})")
    kept = f"{run.budget.layers_kept} of {room.shape.layers} layers not recomputed"
    filled = f"the largest has {max(run.largest.values()):,}"
    say(f"  micro-batches: at most {run.budget.tokens:,} tokens, {filled}, {kept}")
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in run.parts.items() if size)
    where = room.gpu.name if room.gpu else "besides the program's own"
    say(f"  memory: about {size_text(total(run.parts))} of {size_text(room.memory_bytes)}, {where} ({listed})")
    if speed := _estimated_speed(run):
        seconds = tokens / speed
        say(f"  time: about {clock(seconds)} at {speed:,.0f} tokens/s, cost about {trainer.meter.cost(seconds):.2f}")
    else:
        say("  time: known after the first updates (`eta`)")
    say(f"one row as the model sees it, supervised parts in [[ ]] (line {run.samples[0].row}):")
    say(decoded_sample(run.tokenizer, run.samples[0]))


def _run(run: Run, trainer: "UpdateTrainer") -> int:
    status = "stopped by an error"
    try:
        number = trainer.run()
        if number:
            status = "interrupted"
            if run.arguments.train.save_strategy == "no":
                say("save_strategy is no: nothing was saved")
        else:
            final = trainer.save_final()
            status = "finished"
            if is_first_rank():
                print(f"done: {final}")
        return 128 + number if number else 0
    finally:
        if is_first_rank():
            _write_report(run, trainer, status)
        if status != "stopped by an error":
            _leave_group()


def _leave_group() -> None:
    """Ranks part in order; one that just exits may make another one's last collective fail."""
    import torch.distributed as dist

    from finetune.checkpointing import wait_for_ranks

    if dist.is_initialized():
        wait_for_ranks()
        dist.destroy_process_group()


def _write_report(run: Run, trainer: "UpdateTrainer", status: str) -> None:
    import torch

    from finetune import report

    trainer.mark_time()
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    content = {
        "status": status,
        "method": run.method.name,
        **report.run_numbers(trainer.progress, trainer.meter, trainer.state.global_step, run.last_update),
        "predicted": {
            "peak_memory_gib": round(predicted_peak(run.room, run.parts) / GIB, 2),
            "tokens_per_second": _estimated_speed(run),
        },
        "token_budget": trainer.token_budget,
        "largest_micro_batch": max(run.largest.values()),
        "layers_not_recomputed": run.budget.layers_kept,
        "devices": f"{run.room.world_size} x {device}",
        "identity": run.identity,
        "names": run.names,
        "config_file": run.arguments.config_file,
        "config": run.arguments.as_dict(),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "git_commit": report.git_commit(Path(__file__).parent),
        "versions": report.versions(),
        "history": history,
    }
    run.output_dir.mkdir(parents=True, exist_ok=True)
    folders = [run.output_dir, *([run.output_dir / "final"] if status == "finished" else [])]
    for folder in folders:
        report.write_json(folder / "train_report.json", content)
    written = [run.output_dir / "train_report.json"]
    if history:
        written.append(run.output_dir / "loss.png")
        report.draw_losses(history, written[-1], f"{run.output_dir.name} ({status})")
    say(f"report: {', '.join(map(str, written))}")
