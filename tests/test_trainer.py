"""The trainer against a padded plain-torch loop, its resumption, its watchdog and what it does when memory runs out.

A random two-layer Qwen2 in float32 with LoRA dropout, in this process. Rows are random ids, every second half
supervised.
"""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from finetune import saving
from finetune.attention import enable_padding_free_attention
from finetune.checkpointing import RunPlan
from finetune.conversation import Sample
from finetune.errors import UserError
from finetune.loss import enable_chunked_loss
from finetune.signals import silence_lost_output
from finetune.trainer import UpdateTrainer
from finetune.updates import cut_in_pieces

VOCABULARY = 97
ROWS_PER_UPDATE = 4
IDENTITY = {"base_model": "abc", "train_data": "def", "rows_per_update": ROWS_PER_UPDATE}


def make_samples(count: int = 21, seed: int = 1) -> list[Sample]:
    """Rows of 4 to 20 tokens; the second half of each is supervised."""
    draw = random.Random(seed)
    samples = []
    for line in range(1, count + 1):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(4, 20))]
        half = len(ids) // 2
        samples.append(Sample(ids, [-100] * half + ids[half:], line))
    return samples


def make_model(dropout: float = 0.0) -> torch.nn.Module:
    set_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    if dropout:
        from peft import LoraConfig, get_peft_model

        enable_chunked_loss(model)
        enable_padding_free_attention(model)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"])
        return get_peft_model(model, lora)
    return enable_padding_free_attention(enable_chunked_loss(model))


def make_trainer(
    folder: Path, samples: list[Sample] | None = None, model=None, budget: int = 40, **changes
) -> UpdateTrainer:
    evaluation = changes.pop("evaluation", [])
    limit = changes.pop("save_total_limit", 1)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "max_grad_norm": 0.5,
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    plan = RunPlan(ROWS_PER_UPDATE, budget, IDENTITY, save_total_limit=limit, eval_samples=evaluation)
    trainer = UpdateTrainer(
        model=model or make_model(), args=TrainingArguments(**settings), samples=samples or make_samples(), plan=plan
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: UpdateTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def padded_losses(samples: list[Sample], updates: list[list[int]]) -> list[float]:
    """The same updates by hand: one padded batch each, transformers' own logits, torch's loss, AdamW and clipping."""
    model = make_model()
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for number, rows in enumerate(updates):
        longest = max(len(samples[row].input_ids) for row in rows)
        ids = torch.tensor([samples[row].input_ids + [0] * (longest - len(samples[row].input_ids)) for row in rows])
        labels = torch.tensor([samples[row].labels + [-100] * (longest - len(samples[row].labels)) for row in rows])
        mask = torch.tensor([[int(i < len(samples[row].input_ids)) for i in range(longest)] for row in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        # warm-up over two updates from 0, then linear to 0 at update 6
        optimizer.param_groups[0]["lr"] = 1e-2 * (number / 2 if number < 2 else (6 - number) / 4)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_losses_equal_a_padded_loop(tmp_path: Path) -> None:
    samples = make_samples()
    trainer = make_trainer(tmp_path, samples)
    trainer.run()
    updates = [trainer.train_dataset[index].rows for index in range(5)]
    assert losses(trainer)[:5] == pytest.approx(padded_losses(samples, updates), abs=1e-5)
    moved = (trainer.model.lm_head.weight - make_model().lm_head.weight).abs().max().item()
    assert moved > 0.01
    assert trainer.state.global_step == 6


def test_a_logged_loss_is_the_mean_over_the_tokens_of_all_updates_since_the_last(tmp_path: Path) -> None:
    every = make_trainer(tmp_path / "1")
    every.run()
    third = make_trainer(tmp_path / "3", logging_steps=3)
    third.run()
    counts = [every.train_dataset[index].num_supervised for index in range(3)]
    expected = sum(loss * count for loss, count in zip(losses(every)[:3], counts, strict=True)) / sum(counts)
    assert losses(third)[0] == pytest.approx(expected, abs=1e-6)
    assert losses(third)[0] != pytest.approx(sum(losses(every)[:3]) / 3, abs=1e-6)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 13, "save_total_limit": 2}
    whole = make_trainer(tmp_path / "whole", model=make_model(0.2), **settings)
    whole.run()
    for stop_at in (2, 6, 10):  # inside an epoch of 6 updates, at its end, in the second
        first = make_trainer(tmp_path / f"{stop_at}", model=make_model(0.2), **settings)
        first.add_callback(_Kill(stop_at))
        assert first.run() == signal.SIGTERM
        assert first.state.global_step == stop_at
        second = make_trainer(tmp_path / f"{stop_at}", model=make_model(0.2), **settings)
        assert second.run() == 0
        assert losses(second) == losses(whole), stop_at
        assert second.progress.tokens == whole.progress.tokens
        assert second.progress.starts == 2


class _Kill(TrainerCallback):
    """Sends this process a signal while an update is being computed."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def test_only_complete_checkpoints_count(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    make_trainer(tmp_path, model=make_model(0.2), **settings).run()
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [6, 4]
    (tmp_path / "checkpoint-6" / saving.MARKER).unlink()
    (tmp_path / saving.ASIDE / "checkpoint-9").mkdir(parents=True)
    again = make_trainer(tmp_path, model=make_model(0.2), **settings)
    again.run()
    assert "checkpoint-6 is not complete" in capfd.readouterr().err
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [6, 4]
    assert saving.is_complete(tmp_path / "checkpoint-6")
    assert not (tmp_path / saving.ASIDE / "checkpoint-9").exists()


def test_bad_losses_stop_the_run_with_their_rows(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    trainer = make_trainer(tmp_path / "nan", model=model)
    lines = [sorted(trainer.train_dataset.samples[row].row for row in rows) for rows in _updates(trainer)]
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
    average, done = trainer.gradients.average, [0]

    def spoiled() -> None:
        average()
        done[0] += 1
        if done[0] in updates:
            trainer.gradients.parameters[0].grad.view(-1)[0] = value

    monkeypatch.setattr(trainer.gradients, "average", spoiled)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("update", "limit"), [(3, 0.5), (6, 0.5), (3, 0.0)])  # in the middle, the last; unclipped
def test_a_bad_gradient_ruins_no_weight_and_names_its_rows(
    tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture, update: int, limit: float, value: float
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": limit}
    trainer = make_trainer(tmp_path, **settings)
    lines = sorted(trainer.train_dataset.samples[row].row for row in _updates(trainer)[update - 1])
    _spoil_gradients(trainer, monkeypatch, {update}, value)
    assert trainer.run() == 0
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
    trainer.add_callback(_Kill(2, signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        # A test that fails must not take pytest with it.
        signal.signal(signal.SIGHUP, lambda number, frame: None)
        assert trainer.run() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [2]
    assert "SIGHUP: the update in hand is finished and saved" in capfd.readouterr().err


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    """nohup begins a program so."""
    trainer = make_trainer(tmp_path)
    trainer.add_callback(_Kill(2, signal.SIGHUP))
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


def _updates(trainer: UpdateTrainer) -> list[list[int]]:
    return [trainer.train_dataset[index].rows for index in range(len(trainer.train_dataset))]


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


def test_the_best_checkpoint_stays_beside_the_last(tmp_path: Path) -> None:
    held_out = make_samples(5, seed=9)
    trainer = make_trainer(
        tmp_path,
        evaluation=held_out,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        save_strategy="steps",
        save_steps=3,
        learning_rate=0.1,
        max_steps=9,
    )
    trainer.run()
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert sorted(measured) == [2, 4, 6, 8, 9]
    best = min(measured, key=measured.get)
    assert {step for step, _ in saving.list_checkpoints(tmp_path)} == {best, 9}
    state = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    model = make_model()
    model.load_state_dict(Qwen2ForCausalLM.from_pretrained(tmp_path / "checkpoint-9").state_dict())
    assert _plain_loss(model, held_out) == pytest.approx(measured[9], abs=1e-5)


def _plain_loss(model: torch.nn.Module, samples: list[Sample]) -> float:
    model.eval()
    total, count = 0.0, 0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
        labels = torch.tensor(sample.labels)[1:]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def test_cut_in_pieces_keeps_order_and_budget() -> None:
    lengths = [5, 9, 3, 4, 20, 1]
    assert cut_in_pieces([0, 1, 2, 3, 4, 5], lengths, 10) == [[0], [1], [2, 3], [4], [5]]
    assert cut_in_pieces([], lengths, 10) == [[]]


def test_the_next_rows_are_collated_before_the_device_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    from finetune import trainer as module

    samples, events = make_samples(8), []
    trainer = make_trainer(tmp_path, samples, max_steps=3)
    collate, agree = module.collate, trainer._agree
    monkeypatch.setattr(module, "collate", lambda rows: events.append([row.row for row in rows]) or collate(rows))
    monkeypatch.setattr(trainer, "_agree", lambda *words: events.append("wait") or agree(*words))
    trainer.run()
    dataset = trainer.train_dataset
    expected = []
    for epoch, last in ((0, 1), (1, 0)):  # 8 rows are two updates an epoch
        dataset.epoch = epoch
        updates = [dataset[index] for index in range(last + 1)]
        parts = [[[samples[row].row for row in rows] for rows in update.micro_batches] for update in updates]
        following = [[samples[row].row for row in dataset[0].next_rows]]
        assert dataset[1].next_rows is None
        # At an epoch's beginning nothing is there; each later update finds its first micro-batch.
        expected += [*parts[0], *following, "wait"] + ([*parts[1][1:], "wait"] if last else [])
    assert events == expected


def test_forgotten_gradients_are_gone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_samples(4), max_steps=1)
    trainer.run()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_a_run_stopped_in_its_last_update_is_not_trained_further(tmp_path: Path, length: dict) -> None:
    """Neither end is that of an epoch, which has 6 updates."""
    settings = {"save_strategy": "steps", "save_steps": 3, **length}
    whole = make_trainer(tmp_path / "whole", model=make_model(0.2), **settings)
    whole.run()
    last = whole.state.global_step
    stopped = make_trainer(tmp_path / "stopped", model=make_model(0.2), **settings)
    stopped.add_callback(_Kill(last))
    assert stopped.run() == signal.SIGTERM
    again = make_trainer(tmp_path / "stopped", model=make_model(0.2), **settings)
    assert again.run() == 0
    assert again.state.global_step == last and again.progress.tokens == whole.progress.tokens
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name


def test_the_best_checkpoint_survives_a_move_of_the_folder(tmp_path: Path) -> None:
    settings = {"evaluation": make_samples(5, 9), "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
    settings |= {"metric_for_best_model": "loss", "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path / "here", max_steps=8, **settings)
    first.run()
    best = first.state.best_global_step
    assert best < 8 and [step for step, _ in saving.list_checkpoints(tmp_path / "here")] == [8, best]
    (tmp_path / "here").rename(tmp_path / "there")
    second = make_trainer(tmp_path / "there", max_steps=12, **settings)
    second.run()
    assert second.state.best_global_step == best
    assert second.state.best_model_checkpoint == str(tmp_path / "there" / f"checkpoint-{best}")
    assert [step for step, _ in saving.list_checkpoints(tmp_path / "there")] == [12, best]


def test_evaluation_obeys_a_lowered_budget_and_deals_by_the_shared_one(tmp_path: Path, monkeypatch) -> None:
    from finetune import trainer as module

    held, dealt, sizes = make_samples(9, 9), [], []
    trainer = make_trainer(tmp_path, budget=60)
    expected = trainer.evaluate(held)["eval_loss"]
    plan_epoch, collate = module.plan_epoch, module.collate
    monkeypatch.setattr(module, "plan_epoch", lambda *words: dealt.append(words[3]) or plan_epoch(*words))
    monkeypatch.setattr(
        module, "collate", lambda rows: sizes.append(sum(len(row.input_ids) for row in rows)) or collate(rows)
    )
    trainer.token_budget = 24
    assert trainer.evaluate(held)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert dealt == [60] and max(sizes) <= 24


def test_time_can_be_marked_before_training_begins(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.mark_time()
    assert 0 <= trainer.progress.seconds < 60
