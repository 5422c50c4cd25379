"""What the trainer does when something goes wrong: losses, gradients, weights that are no numbers, signals, memory."""

import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM, TrainerCallback

from finetune import saving
from finetune.conversation import Sample
from finetune.errors import UserError
from finetune.progress import Meter, ProgressCallback
from finetune.signals import silence_lost_output
from finetune.trainer import UpdateTrainer
from tests.small_trainer import (
    Kill,
    losses,
    make_model,
    make_samples,
    make_trainer,
    updates_of,
)


def test_bad_losses_stop_the_run_with_their_rows(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    trainer = make_trainer(tmp_path / "nan", model=model)
    lines = [sorted(trainer.train_dataset.samples[row].row for row in rows) for rows in updates_of(trainer)]
    with pytest.raises(UserError, match="3 updates in a row with loss nan") as failure:
        trainer.run()
    assert ", ".join(map(str, lines[2])) in str(failure.value)
    assert ", ".join(map(str, lines[0])) in capfd.readouterr().err
    # The bad updates left the other weights as they were.
    assert torch.isfinite(model.lm_head.weight).all()

    unsupervised = [Sample(sample.input_ids, [-100] * len(sample.labels), sample.row) for sample in make_samples()]
    with pytest.raises(UserError, match="no supervised token"):
        make_trainer(tmp_path / "zero", unsupervised).run()


def _spoil_gradients(trainer: UpdateTrainer, monkeypatch, updates: set[int], value: float = float("inf")) -> None:
    """One gradient of each of these updates (from 1) becomes `value`; the losses stay as they are."""
    add_up, done = trainer.gradients.add_up, [0]

    def spoiled() -> None:
        add_up()
        done[0] += 1
        if done[0] in updates:
            trainer.gradients.parameters[0].grad.view(-1)[0] = value

    monkeypatch.setattr(trainer.gradients, "add_up", spoiled)


class _Weights(TrainerCallback):
    """`unmoved`: the updates, from 1, that left every weight as it was."""

    def __init__(self) -> None:
        self.unmoved: list[int] = []

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        self.before = [parameter.clone() for parameter in model.parameters()]

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if all(map(torch.equal, model.parameters(), self.before)):
            self.unmoved.append(state.global_step)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("update", "limit"), [(3, 0.5), (6, 0.5), (3, 0.0)])  # in the middle, the last; unclipped
def test_a_bad_gradient_ruins_no_weight_and_names_its_rows(
    tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture, update: int, limit: float, value: float
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": limit}
    trainer = make_trainer(tmp_path, **settings)
    lines = sorted(trainer.train_dataset.samples[row].row for row in updates_of(trainer)[update - 1])
    _spoil_gradients(trainer, monkeypatch, {update}, value)
    weights = _Weights()
    trainer.add_callback(weights)
    assert trainer.run() == 0
    assert weights.unmoved == [1, update]  # the warm-up begins with a learning rate of 0
    final = trainer.save_final()
    said = capfd.readouterr().err
    assert said.count("in a row with") == 1
    assert f"1 update in a row with gradient norm {value}; the last one, update {update}, had" in said
    assert f"of lines {', '.join(map(str, lines))}. Look" in said
    assert all(map(math.isfinite, losses(trainer)))
    for folder in (tmp_path / "checkpoint-6", final):
        saved = Qwen2ForCausalLM.from_pretrained(folder)
        assert all(torch.isfinite(parameter).all() for parameter in saved.parameters()), folder


def test_bad_gradients_in_a_row_end_the_run(tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    _spoil_gradients(trainer, monkeypatch, {1, 3, 4, 5})
    with pytest.raises(UserError, match="3 updates in a row with gradient norm inf; the last one, update 5, had"):
        trainer.run()
    saved = Qwen2ForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_infinite_gradients_are_left_to_a_scaler(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    trainer = make_trainer(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    _spoil_gradients(trainer, monkeypatch, {2, 3, 4})
    assert trainer.run() == 0
    assert "in a row with" not in capfd.readouterr().err
    assert scaler.get_scale() == 0.5  # halved at each of the three updates that it skipped
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_a_bad_gradient_is_found_where_the_loss_is_read(tmp_path: Path, monkeypatch) -> None:
    """The device is waited for once an update: the norm is not read on its way to the sum that both are read from."""
    trainer, events = make_trainer(tmp_path, max_steps=2), []
    monkeypatch.setattr(trainer, "_sum_over_ranks", lambda values: events.append("read") or values)
    clip, agree = trainer.gradients.clip, trainer._agree

    def clipped(*words) -> None:
        events.append("clip")
        with _ReadsTensors(events):
            clip(*words)

    def agreed(*words) -> tuple[float, float]:
        with _ReadsTensors(events):
            return agree(*words)

    monkeypatch.setattr(trainer.gradients, "clip", clipped)
    monkeypatch.setattr(trainer, "_agree", agreed)
    trainer.run()
    assert events == ["clip", "read"] * 2


class _ReadsTensors(TorchDispatchMode):
    """Notes each number that is read out of a tensor of one element."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, words=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.events.append("item")
        return function(*words, **(named or {}))


@pytest.mark.parametrize("where", ["checkpoint", "final"])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, where: str) -> None:
    """As after a step that overflows: the checkpoint before it stays, and no final/ appears."""
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).run()
    trainer = make_trainer(
        tmp_path, max_steps=4, save_strategy="steps" if where == "checkpoint" else "no", save_steps=4
    )
    trainer.add_callback(_Ruin(4))
    with pytest.raises(UserError, match="after update 4 trained weights are NaN or infinite: they are not saved"):
        trainer.run()
        trainer.save_final()
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [2]
    assert not (tmp_path / "final").exists()


class _Ruin(TrainerCallback):
    """Makes one weight NaN at the end of an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == self.step:
            model.lm_head.weight.data[0, 0] = float("nan")


def test_a_hang_up_is_obeyed_as_sigterm(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=5)
    trainer.add_callback(Kill(2, signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        # A test that fails must not take pytest with it.
        signal.signal(signal.SIGHUP, lambda number, frame: None)
        assert trainer.run() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [2]
    assert "SIGHUP: the update in hand is finished and saved" in capfd.readouterr().err


def test_a_reader_of_the_log_who_leaves_is_obeyed_as_a_hang_up(tmp_path: Path, monkeypatch) -> None:
    """`make qwen-train 2>&1 | head`, or q in less: the update in hand is saved."""
    reader, writer = os.pipe()
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=5)
    with open(writer, "w") as stream:
        trainer.add_callback(ProgressCallback(trainer, Meter(1.0), stream))
        os.close(reader)
        assert trainer.run() == signal.SIGTERM
        silence_lost_output((writer,))
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [2]


def test_a_warning_that_nobody_reads_loses_no_update(tmp_path: Path, monkeypatch) -> None:
    reader, writer = os.pipe()
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=5, logging_steps=10)
    _spoil_gradients(trainer, monkeypatch, {3}, math.inf)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        os.close(reader)
        assert trainer.run() == signal.SIGTERM
        silence_lost_output((writer,))
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [4]


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    """nohup begins a program so."""
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Kill(2, signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert trainer.run() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_output_that_nobody_can_receive_raises_no_more(kind: str) -> None:
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    silence_lost_output((writer,))
    os.write(writer, b"heard")
    assert os.read(reader, 5) == b"heard"
    os.close(reader)
    with pytest.raises(OSError):
        os.write(writer, b"lost")
    silence_lost_output((writer,))
    os.write(writer, b"lost")
    os.close(writer)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_out_of_memory_loses_nothing(tmp_path: Path, where: str, capfd: pytest.CaptureFixture) -> None:
    whole = make_trainer(tmp_path / "whole", budget=80)
    whole.run()
    model = make_model()
    cut = make_trainer(tmp_path / "cut", model=model, budget=80)
    if where == "forward":
        model.model.layers[1].register_forward_pre_hook(_fail_above(24))
    else:
        # In the first layer's backward pass the head and the second layer have their gradients already.
        model.model.layers[0].register_full_backward_hook(lambda *_: _fail_above(24)(None, _[2]))
    cut.run()
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-5)
    assert 0 < cut.token_budget <= 24
    assert "out of GPU memory" in capfd.readouterr().err


def _fail_above(tokens: int):
    def hook(module, inputs, *rest) -> None:
        if inputs[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("injected")

    return hook


def test_a_row_that_cannot_fit_ends_the_run_with_words(tmp_path: Path) -> None:
    model = make_model()
    model.model.layers[1].register_forward_pre_hook(_fail_above(3))
    with pytest.raises(UserError, match="out of GPU memory with a single row"):
        make_trainer(tmp_path, model=model).run()
