"""The trainer against a padded plain-torch loop, its resumption, its best checkpoint, its last update."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from finetune import saving
from finetune.conversation import Sample
from finetune.updates import cut_in_pieces
from tests.small_trainer import (
    Kill,
    losses,
    make_model,
    make_samples,
    make_trainer,
    updates_of,
)


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
        first.add_callback(Kill(stop_at))
        assert first.run() == signal.SIGTERM
        assert first.state.global_step == stop_at
        second = make_trainer(tmp_path / f"{stop_at}", model=make_model(0.2), **settings)
        assert second.run() == 0
        assert losses(second) == losses(whole), stop_at
        assert second.progress.tokens == whole.progress.tokens
        assert second.progress.starts == 2


def test_only_complete_checkpoints_count(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    make_trainer(tmp_path, model=make_model(0.2), **settings).run()
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [6, 4]
    (tmp_path / "checkpoint-6" / saving.MARKER).write_text("{")
    (tmp_path / saving.ASIDE / "checkpoint-9").mkdir(parents=True)
    again = make_trainer(tmp_path, model=make_model(0.2), **settings)
    again.run()
    assert "checkpoint-6 is not complete" in capfd.readouterr().err
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [6, 4]
    assert saving.is_complete(tmp_path / "checkpoint-6")
    assert not (tmp_path / saving.ASIDE / "checkpoint-9").exists()


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
    stopped.add_callback(Kill(last))
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


def test_a_resumed_run_saves_logs_and_evaluates_as_it_is_told_now(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=500, logging_steps=10, max_steps=4).run()
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [4]
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    again = make_trainer(tmp_path, evaluation=make_samples(5, seed=9), save_total_limit=9, max_steps=10, **settings)
    again.run()
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [10, 8, 6, 4]
    history = again.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry and entry["step"] > 4] == [5, 6, 7, 8, 9, 10]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [6, 9, 10]  # and at the end


@pytest.mark.parametrize("stop_at", [2, None])
def test_no_checkpoint_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None) -> None:
    """transformers saves at an epoch's end whatever was saved at the update before it, and ends an epoch at a stop."""
    published, publish = [], saving.publish
    monkeypatch.setattr(saving, "publish", lambda *words: published.append(words[1].name) or publish(*words))
    evaluation = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "loss"}
    trainer = make_trainer(
        tmp_path, evaluation=make_samples(5, seed=9), save_strategy="epoch", max_steps=12, **evaluation
    )
    if stop_at:
        trainer.add_callback(Kill(stop_at))
    trainer.run()
    assert published == ([f"checkpoint-{stop_at}"] if stop_at else ["checkpoint-6", "checkpoint-12"])


def test_an_evaluation_is_the_same_in_how_many_parts_it_is_dealt_out(tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, evaluation=make_samples(23, seed=9))
    whole = trainer.evaluate()["eval_loss"]
    monkeypatch.setattr("finetune.trainer.ROWS_DEALT_OUT", 4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_infinite_gradients_are_a_scalers_business_until_its_scale_is_below_1(tmp_path: Path) -> None:
    trainer, scale = make_trainer(tmp_path), [65536.0]
    assert trainer._judges_gradients
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale[0])
    assert not trainer._judges_gradients
    scale[0] = 0.5
    assert trainer._judges_gradients


def test_another_length_than_the_one_begun_is_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for planned in (6, 6, 9):
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=planned)
        trainer.plan.record["updates_planned"] = planned
        trainer.run()
    told = capfd.readouterr().err
    assert told.count("note: it was written when") == 1
    assert "written when 6 updates were planned, now 9 are" in told


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(tmp_path: Path) -> None:
    """Linear after two updates of warm-up: the shorter run had come down to 0, the longer one is at 3/4."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).run()
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=10)
    trainer.run()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[4:] == pytest.approx([1e-2 * left / 8 for left in (6, 5, 4, 3, 2, 1)])


def test_the_last_updates_are_logged_whatever_the_interval(tmp_path: Path) -> None:
    every, last = (make_trainer(tmp_path, logging_steps=steps, max_steps=6) for steps in (1, 4))
    for trainer in (every, last):
        trainer.run()
    logged = {entry["step"]: entry["loss"] for entry in last.state.log_history if "loss" in entry}
    tokens = [sum(every.train_dataset.supervised[row] for row in rows) for rows in updates_of(every)]
    sums = [loss * count for loss, count in zip(losses(every), tokens, strict=True)]
    expected = {4: sum(sums[:4]) / sum(tokens[:4]), 6: sum(sums[4:]) / sum(tokens[4:])}
    assert logged == pytest.approx(expected, abs=1e-5)
