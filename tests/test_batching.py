"""The batch plan: every row once per epoch, budgets kept, ranks in step; and the padding-free micro-batch."""

import random
from types import SimpleNamespace

import pytest

from finetune.batching import collate, plan_epoch
from finetune.errors import UserError
from finetune.room import predicted_parts
from finetune.updates import UpdateDataset


def random_case(seed: int) -> dict:
    """Arguments of plan_epoch, from one row to several hundred, with and without rows over the budget."""
    draw = random.Random(seed)
    longest = draw.choice([1, 8, 100, 2048])
    return {
        "lengths": [draw.randint(1, longest) for _ in range(draw.randint(1, 300))],
        "rows_per_update": draw.choice([1, 2, 7, 16, 64]),
        "world_size": draw.randint(1, 4),
        "token_budget": draw.choice([1, 64, 1024, 4096]),
        "seed": draw.randint(0, 5),
        "epoch": draw.randint(0, 5),
    }


@pytest.mark.parametrize("seed", range(60))
def test_plan_keeps_its_promises(seed):
    case = random_case(seed)
    lengths, rows_per_update = case["lengths"], case["rows_per_update"]
    updates = plan_epoch(**case)
    assert sorted(row for update in updates for row in update.rows) == list(range(len(lengths)))
    assert [len(update.rows) for update in updates[:-1]] == [rows_per_update] * (len(updates) - 1)
    assert 1 <= len(updates[-1].rows) <= rows_per_update
    for update in updates:
        assert len(update.micro_batches) == case["world_size"]
        assert len({len(steps) for steps in update.micro_batches}) == 1
        for rows in (rows for steps in update.micro_batches for rows in steps):
            assert len(rows) <= 1 or sum(lengths[row] for row in rows) <= case["token_budget"]
        if len(update.rows) >= case["world_size"] * len(update.micro_batches[0]):
            assert all(rows for steps in update.micro_batches for rows in steps)
    assert updates == plan_epoch(**case)


def test_epochs_and_seeds_differ_in_order_only():
    lengths = [5] * 50
    plans = [plan_epoch(lengths, 10, 1, 1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    firsts = [plan[0].rows for plan in plans]
    assert firsts[0] != firsts[1] and firsts[0] != firsts[2] and firsts[1] != firsts[2]


def test_loads_are_balanced_and_micro_batches_few():
    draw = random.Random(3)
    lengths = [min(1024, max(32, int(draw.lognormvariate(4.9, 0.6)))) for _ in range(6400)]
    for update in plan_epoch(lengths, 64, 4, 2048, 0, 0):
        loads = [sum(lengths[row] for rows in steps for row in rows) for steps in update.micro_batches]
        # A rank waits for the slowest one: 5 % is far below the spread of dealing rows out by number (about 20 %).
        assert max(loads) <= 1.05 * sum(loads) / 4
        assert len(update.micro_batches[0]) <= -(-sum(loads) // (4 * 2048)) + 1


def test_long_row_is_alone_and_few_rows_leave_empty_places():
    (update,) = plan_epoch([900, 3, 4], 8, 1, 100, 0, 0)
    assert sorted(map(sorted, update.micro_batches[0])) == [[0], [1, 2]]
    (update,) = plan_epoch([10], 8, 3, 100, 0, 0)
    assert sorted(steps[0] for steps in update.micro_batches) == [[], [], [0]]


@pytest.mark.parametrize("wrong", [{"rows_per_update": 0}, {"world_size": 0}, {"token_budget": 0}, {"lengths": [3, 0]}])
def test_impossible_numbers_are_refused(wrong):
    case = {"lengths": [3], "rows_per_update": 1, "world_size": 1, "token_budget": 10, "seed": 0, "epoch": 0}
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        plan_epoch(**case | wrong)


def test_collate_by_hand():
    batch = collate(
        [
            SimpleNamespace(input_ids=[7, 8, 9], labels=[7, -100, 9]),
            SimpleNamespace(input_ids=[4, 5], labels=[-100, 5]),
        ]
    )
    assert batch["input_ids"].tolist() == [[7, 8, 9, 4, 5]]
    assert batch["labels"].tolist() == [[-100, -100, 9, -100, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert str(batch["cu_seq_lens_q"].dtype) == "torch.int32"
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_collate_of_nothing_is_one_unsupervised_token():
    batch = collate([])
    assert batch["input_ids"].shape == (1, 1) and batch["labels"].tolist() == [[-100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1]


def test_many_rows_of_more_than_half_the_budget_are_packed_at_once():
    lengths = [600 + index % 100 for index in range(20_000)]
    (update,) = plan_epoch(lengths, len(lengths), 2, 1024, seed=0, epoch=0)
    assert sorted(update.rows) == list(range(20_000)) and all(len(rows) == 1 for rows in update.micro_batches[0])


def test_two_rows_of_half_the_budget_share_a_micro_batch():
    (update,) = plan_epoch([4, 4], 2, 1, 8, 0, 0)
    assert [len(steps) for steps in update.micro_batches] == [1]


def test_no_rank_always_has_the_larger_micro_batch():
    # Three steps of two ranks. Rows into the emptiest of six places: 8, 7, 6, 5, 4 + 1, 3 + 2. In turn, the larger of
    # two goes to the first and to the second rank: 8 + 5 + 5 and 7 + 6 + 5.
    lengths = [8, 7, 6, 5, 4, 3, 2, 1]
    (update,) = plan_epoch(lengths, 8, 2, 8, 0, 0)
    assert [sum(lengths[row] for rows in steps for row in rows) for steps in update.micro_batches] == [18, 18]


def test_largest_micro_batches_of_updates_of_one_and_of_two():
    lengths = [3, 5, 3, 8, 4, 4]
    samples = [SimpleNamespace(input_ids=[1] * length, labels=[1] * length) for length in lengths]
    # 27 tokens and room for 8 on each of two ranks: two each, one of them the row of 8. A row an update: one each.
    assert UpdateDataset(samples, 6, 8, seed=0, world_size=2).largest_micro_batches(1) == {2: 8}
    assert UpdateDataset(samples, 1, 8, seed=0, world_size=2).largest_micro_batches(6) == {1: 8}
    # Of several epochs, each in an order of its own: in some update 8 meets 5.
    assert UpdateDataset(samples, 2, 99, seed=0).largest_micro_batches(3 * 40) == {1: 13}
    # Two rows an update fit side by side unless the 8 or the 5 meets more than 9 - 8 or 9 - 5 tokens.
    mixed = UpdateDataset(samples, 2, 9, seed=0)
    expected: dict[int, int] = {}
    for update in plan_epoch(lengths, 2, 1, 9, 0, 0):
        one, other = (lengths[row] for row in update.rows)
        count, largest = (1, one + other) if one + other <= 9 else (2, max(one, other))
        expected[count] = max(largest, expected.get(count, 0))
    assert mixed.largest_micro_batches(3) == expected and sorted(expected) == [1, 2]


def test_what_is_planned_is_the_update_that_takes_most():
    method = SimpleNamespace(
        predict_memory=lambda room, budget, count: {"kept": budget.tokens, "gradients": 100 if count > 1 else 0}
    )
    assert predicted_parts(method, None, 0, {1: 90, 2: 50}) == {"kept": 50, "gradients": 100}
    assert predicted_parts(method, None, 0, {1: 190, 2: 50}) == {"kept": 190, "gradients": 0}
