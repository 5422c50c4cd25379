"""Estimates of memory and time for cases that no measured run covers, by hand from what the parts mean."""

from dataclasses import replace

import pytest

from finetune.arguments import TrainArguments
from finetune.gpus import named_gpu
from finetune.memory import KNOWN_SHAPES, Shape, full_memory, qlora_memory, shape_of_config, total
from finetune.speed import (
    SEVERAL_CARDS_SECONDS,
    Budget,
    choose_full_budget,
    full_tokens_per_second,
    full_update_seconds,
    layers_allowed,
)

BAICHUAN, H100 = KNOWN_SHAPES["baichuan2-7b"], named_gpu("H100")
PARAMETERS = 7_505_973_248
# Eight cards with 8,000 tokens of an update each, eight micro-batches.
BUDGET, CARDS, MICRO_BATCHES, TOKENS = Budget(1000, 32), 8, 8, 64_000


@pytest.mark.parametrize(
    ("stage", "passes", "times"),
    [
        ("1", 2, 1),  # gradients are reduced and weights gathered, once an update
        ("2", MICRO_BATCHES + 1, 1),  # gradients are reduced in each micro-batch, weights gathered once an update
        ("3", 3 * MICRO_BATCHES, MICRO_BATCHES),  # each gathers weights forward and backward, and reduces gradients
    ],
)
def test_a_slow_link_bounds_an_update_by_what_its_stage_sends(stage, passes, times):
    slow = replace(H100, link_gb_per_second=1.0)
    sent = passes * 2 * PARAMETERS * 7 / 8  # seven eighths of 16-bit numbers lie on other cards
    expected = sent / 1e9 + times * SEVERAL_CARDS_SECONDS[stage] * PARAMETERS / 1e9
    assert full_update_seconds(BAICHUAN, slow, BUDGET, stage, CARDS, TOKENS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "crossings"),
    [
        ("2-offload", 2),  # gradients to main memory, weights back
        ("3-offload", 2 + 2 * MICRO_BATCHES),  # and each micro-batch fetches the weights, forward and backward
    ],
)
def test_offloading_adds_the_way_to_main_memory_and_the_hosts_adam(stage, crossings):
    fast = replace(H100, link_gb_per_second=1e9)  # between cards nothing takes time
    computing = 8000 / full_tokens_per_second(BAICHUAN, fast, BUDGET)
    # Each card's eighth of 16-bit numbers at 20 GB/s; the host's Adam takes 2e9 parameters a second.
    expected = computing + crossings * 2 * PARAMETERS / 8 / 20e9 + PARAMETERS / 2e9
    assert full_update_seconds(BAICHUAN, fast, BUDGET, stage, CARDS, TOKENS) == pytest.approx(expected)


def test_a_row_longer_than_a_fixed_budget_is_counted_in_full_training():
    room = total(full_memory(BAICHUAN, "3", CARDS, 4096, 0))
    chosen = [choose_full_budget(BAICHUAN, "3", H100, CARDS, room, row, TOKENS, tokens=256) for row in (4096, 4097)]
    assert chosen == [Budget(256, 0), None]


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ({"gradient_checkpointing": False}, (40, 40)),
        ({"recompute_layers": -1}, None),
        ({"recompute_layers": 10}, (30, 30)),
        ({"recompute_layers": 99}, (0, 0)),
    ],
    ids=["all", "any number", "all but 10", "none"],
)
def test_layers_that_the_json_lets_a_plan_keep(words, allowed):
    assert layers_allowed(replace(TrainArguments(), **words), 40) == allowed


def test_buffers_of_transfers_between_cards():
    # Small gradients go 50 million at a time, in 32 bits; rank 8 of 7 B has 20 million of them, rank 64 160 million.
    assert BAICHUAN.lora_parameters(8) == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 19_988_480
    sizes = [qlora_memory(BAICHUAN, rank, 100, 0, gpus=n)["buffers"] for rank, n in ((8, 1), (8, 2), (64, 2))]
    assert sizes == [0, 4 * 19_988_480, 4 * 50_000_000]
    # DeepSpeed fills one bucket of 200 million 16-bit numbers while another is sent; stage 3 keeps up to 1e9 gathered.
    sizes = [full_memory(BAICHUAN, stage, 2, 100, 0)["buffers"] for stage in ("none", "1", "2", "3")]
    assert sizes == [0, *[2 * 2 * 200_000_000] * 2, 2 * 2 * 200_000_000 + 2 * 1_000_000_000]
    small = Shape(256, 4, 4, 4, 64, 512, 1000)
    assert full_memory(small, "3", 2, 100, 0)["buffers"] == (2 + 1) * 2 * small.parameters


def test_a_llama_whose_attention_has_biases():
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    shapes = [shape_of_config(config | more) for more in ({}, {"attention_bias": False}, {"attention_bias": True})]
    assert [shape.has_qkv_bias for shape in shapes] == [False, False, True]


def test_of_equally_fast_budgets_the_largest_cuts_fewest_updates() -> None:
    room = 500 * 2**30
    # An update of 16,000 tokens on two cards: one micro-batch each, also of an update that is an eighth larger.
    assert choose_full_budget(BAICHUAN, "3", H100, 2, room, 512, 16_000) == Budget(8960, 32)
    # What is cut in two anyway: the most that fits, not the half that the mean update needs.
    two_halves = total(full_memory(BAICHUAN, "none", 1, 12_288, 32))
    assert choose_full_budget(BAICHUAN, "none", H100, 1, two_halves, 512, 16_000) == Budget(12_288, 32)
