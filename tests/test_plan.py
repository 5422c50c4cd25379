"""The plan's arithmetic against sums written out by hand and against what an H100 measured."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from finetune import plan, plan_options
from finetune.arguments import TrainArguments, parse_arguments
from finetune.errors import UserError
from finetune.gpus import GIB, found_gpu, named_gpu
from finetune.memory import (
    KNOWN_SHAPES,
    full_memory,
    host_memory,
    qlora_memory,
    shape_of_config,
    total,
)
from finetune.speed import (
    SEVERAL_CARDS_SECONDS,
    Budget,
    choose_full_budget,
    choose_qlora_budget,
    full_flops_per_token,
    full_tokens_per_second,
    full_update_seconds,
    qlora_flops_per_token,
    qlora_tokens_per_second,
)

REPOSITORY = Path(__file__).resolve().parent.parent
QWEN, BAICHUAN = KNOWN_SHAPES["qwen-14b"], KNOWN_SHAPES["baichuan2-7b"]
H100 = named_gpu("H100")
TRAIN = TrainArguments()

# One H100 80GB, torch 2.11, the shipped commands (benchmarks/results): tokens of the largest micro-batch and of the
# mean one, layers not recomputed, peak GiB that torch allocated, trained tokens per second. LoRA has rank 64.
# Two cards, each with one micro-batch an update and with two.
MEASURED_QLORA = [
    (11715, 10610, 40, 64.0, 9789),
    (5858, 5305, 40, 39.0, 8820),
]
# Qwen-1.8B's shape on other H100 machines: bound by the host, whose launches take 9.9 to 16 ms a layer.
MEASURED_SMALL_QLORA = (10610, 24, 31380)
# All of 7.5 B parameters, weights, gradients and moments in bfloat16, 3 to 4 micro-batches an update; the first three
# were a loop's on the way here. All but the last kept the norms' results and SwiGLU's product.
MEASURED_FULL = [
    (8192, 8192, 0, 59.3, 10316, True),
    (8192, 8192, 8, 66.8, 11261, True),
    (16384, 16384, 0, 62.4, 10983, True),
    (3771, 3630, 32, 72.9, 12910, True),
    (5817, 5280, 32, 74.6, 12749, False),
]
# Two H200 joined by NVLink (benchmarks/results/h200-x2): stage, cards, tokens of the largest micro-batch by how many an
# update has, peak GiB of a card, tokens per second of all in updates of one. 48 rows of 328 tokens an update.
MEASURED_CARDS = [
    ("none", 1, {1: 15969, 2: 8920}, 89.2, 13654),
    ("none", 2, {1: 7998, 2: 4482}, 70.8, 23345),
    ("1", 2, {1: 7998, 2: 4482}, 96.0, 20495),
    ("2", 2, {1: 7998, 2: 4482}, 96.0, 20752),
    ("3", 2, {1: 7998, 2: 4482}, 92.1, 18109),
]
TOKENS_PER_UPDATE = 15_741
MEASURED_QLORA_CARDS = [(11715, 1, 64.0), (5858, 2, 39.0), (11363, 2, 62.5)]  # largest micro-batch, cards, peak GiB


def test_parameters_by_hand() -> None:
    # Qwen-14B: 40 layers of 4 x 5120^2 + 3 x 5120 x 13696, biases of q, k, v, two norms; final norm; 2 x 152064 x 5120
    by_hand = 40 * (4 * 5120**2 + 3 * 5120 * 13696 + 3 * 5120 + 2 * 5120) + 5120 + 2 * 152064 * 5120
    assert QWEN.parameters == by_hand == 14_167_290_880
    # Baichuan2-7B's published count
    assert BAICHUAN.parameters == 7_505_973_248
    # rank 64: q, k, v, o 5120 -> 5120; gate, up 5120 -> 13696; down 13696 -> 5120
    assert QWEN.lora_parameters(64) == 40 * 64 * (4 * (5120 + 5120) + 3 * (5120 + 13696))


def test_shapes_of_configs_native_and_original() -> None:
    original = {
        "model_type": "qwen",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 27392,
        "vocab_size": 152064,
    }
    native = {**original, "model_type": "qwen2", "intermediate_size": 13696, "num_key_value_heads": 40}
    assert shape_of_config(original) == shape_of_config(native) == QWEN
    grouped = shape_of_config({**native, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True})
    assert grouped.projections[:4] == ((5120, 2560), (5120, 512), (5120, 512), (2560, 5120))
    assert grouped.embedding_parameters == 152064 * 5120
    with pytest.raises(UserError, match="hidden_size"):
        shape_of_config({"num_attention_heads": 2})


def test_qlora_memory_by_hand() -> None:
    parts = qlora_memory(QWEN, 64, tokens=1000, layers_kept=40, lora_bytes=4, optimizer_bytes=8)
    nf4 = 40 * (4 * 5120**2 + 3 * 5120 * 13696) * (0.5 + 1 / 64 + 4 / 16384)
    rest = (2 * 152064 * 5120 + 40 * 5 * 5120 + 5120) * 2
    lora = 40 * 64 * (4 * 10240 + 3 * 18816)
    assert parts["weights"] == pytest.approx(nf4 + rest + 4 * lora)
    assert parts["gradients"] == 4 * lora
    assert parts["optimizer"] == 8 * lora
    # x, q, k, v, attention's output, x again; gate, up; and one dequantised weight
    assert parts["activations"] == 40 * 1000 * 2 * (6 * 5120 + 2 * 13696) + 2 * 5120 * 13696
    assert parts["logits"] == 1024 * 152064 * 6
    assert parts["buffers"] == 0
    recomputed = qlora_memory(QWEN, 64, 2000, 0, 4, 8)["activations"]
    assert recomputed == 40 * 2000 * 2 * 5120 + 2000 * 2 * (6 * 5120 + 2 * 13696)


def test_full_memory_by_hand() -> None:
    p = 7_505_973_248
    kept = {stage: full_memory(BAICHUAN, stage, 4, 8192, 0) for stage in ("1", "2", "3", "2-offload", "3-offload")}
    shares = {s: (m["weights"] / p, m["gradients"] / p, m["optimizer"] / p) for s, m in kept.items()}
    assert shares == {
        "1": (2, 2, 3),
        "2": (2, 0.5, 3),
        "3": (0.5, 0.5, 3),
        "2-offload": (2, 0, 0),
        "3-offload": (0, 0, 0),
    }
    alone = full_memory(BAICHUAN, "none", 1, 8192, 0)
    assert (alone["weights"], alone["gradients"], alone["optimizer"], alone["buffers"]) == (2 * p, 2 * p, 4 * p, 0)
    # One micro-batch an update: gradients come while activations go, so both are never there; the head's come first.
    head = 2 * 125_696 * 4096
    assert full_memory(BAICHUAN, "none", 4, 16384, 32, 1)["gradients"] == head
    few = full_memory(BAICHUAN, "none", 4, 512, 32, 1)
    assert few["gradients"] + few["activations"] == 2 * p
    assert [full_memory(BAICHUAN, stage, 4, 8192, 0, 1)["gradients"] / p for stage in "123"] == [0.5, 0.5, 0.5]
    assert host_memory(BAICHUAN, "2-offload") == 14 * p
    assert host_memory(BAICHUAN, "3-offload") == 16 * p
    assert host_memory(BAICHUAN, "3") == 0


@pytest.mark.parametrize(("largest", "mean", "kept", "gib", "speed"), MEASURED_QLORA)
def test_qlora_estimates_are_near_the_measured(largest: int, mean: int, kept: int, gib: float, speed: int) -> None:
    assert total(qlora_memory(QWEN, 64, largest, kept)) / GIB == pytest.approx(gib, rel=0.10)
    assert qlora_tokens_per_second(QWEN, 64, H100, Budget(mean, kept)) == pytest.approx(speed, rel=0.10)


def test_a_small_model_is_bound_by_its_launches() -> None:
    tokens, kept, speed = MEASURED_SMALL_QLORA
    small = KNOWN_SHAPES["qwen-1_8b"]
    assert qlora_tokens_per_second(small, 64, H100, Budget(tokens, kept)) == pytest.approx(speed, rel=0.25)
    # On a card that computes more slowly than that the floor is none.
    t4 = named_gpu("T4")
    speeds = [qlora_tokens_per_second(small, 64, card, Budget(4096, 24)) for card in (t4, replace(t4, peak_tflops=60))]
    assert speeds[0] / speeds[1] == pytest.approx(65 / 60)
    # Launches are saved by larger micro-batches: an update is one, where it fits.
    room = plan_options.usable_bytes(H100)
    assert choose_qlora_budget(small, 64, H100, room, 512, 10_000) == Budget(math.ceil(1.12 * 10_000), 24)


def test_fp8_products_are_counted() -> None:
    speeds = [qlora_tokens_per_second(QWEN, 64, H100, Budget(10610, 40), fp8) for fp8 in (False, True)]
    assert speeds[1] == pytest.approx(11199, rel=0.05) and speeds[1] > 1.1 * speeds[0]


@pytest.mark.parametrize(("largest", "mean", "kept", "gib", "speed", "keeps_all"), MEASURED_FULL)
def test_full_estimates_are_near_the_measured(
    largest: int, mean: int, kept: int, gib: float, speed: int, keeps_all: bool
) -> None:
    more = BAICHUAN.kept_per_token(False) - BAICHUAN.kept_per_token(True) if keeps_all else 0
    predicted = total(full_memory(BAICHUAN, "none", 1, largest, kept)) + 2 * kept * largest * more
    assert predicted / GIB == pytest.approx(gib, rel=0.10)
    assert full_tokens_per_second(BAICHUAN, H100, Budget(mean, kept)) == pytest.approx(speed, rel=0.15)


@pytest.mark.parametrize(("stage", "gpus", "largest", "gib", "speed"), MEASURED_CARDS)
def test_estimates_of_two_cards_are_near_the_measured(
    stage: str, gpus: int, largest: dict[int, int], gib: float, speed: int
) -> None:
    h200 = named_gpu("H200")
    predicted = max(total(full_memory(BAICHUAN, stage, gpus, tokens, 32, count)) for count, tokens in largest.items())
    assert predicted / GIB == pytest.approx(gib, rel=0.03)
    seconds = full_update_seconds(BAICHUAN, h200, Budget(16384 // gpus, 32), stage, gpus, TOKENS_PER_UPDATE)
    assert TOKENS_PER_UPDATE / seconds == pytest.approx(speed, rel=0.05)


@pytest.mark.parametrize(("largest", "gpus", "gib"), MEASURED_QLORA_CARDS)
def test_qlora_memory_of_two_cards_is_near_the_measured(largest: int, gpus: int, gib: float) -> None:
    assert total(qlora_memory(QWEN, 64, largest, 40, gpus=gpus)) / GIB == pytest.approx(gib, rel=0.03)


def test_a_copy_on_each_card_sends_its_gradients_behind_the_last_micro_batch() -> None:
    slow = replace(H100, link_gb_per_second=1.0)
    alone, two = (full_update_seconds(BAICHUAN, slow, Budget(4096, 32), "none", n, n * 16000) for n in (1, 2))
    # Reduced and spread: half of 15 GB goes out twice, at 1 GB/s.
    assert two - alone == pytest.approx((2 * 2 / 2 + SEVERAL_CARDS_SECONDS["none"]) * 7.505973248)


def test_flops_by_hand() -> None:
    products = 40 * (4 * 5120**2 + 3 * 5120 * 13696)
    head, lora = 152064 * 5120, 40 * 64 * (4 * 10240 + 3 * 18816)
    assert qlora_flops_per_token(QWEN, 64) == 4 * (products + head) + 6 * lora
    assert qlora_flops_per_token(QWEN, 64, 1.0) == 6 * products + 4 * head + 6 * lora
    assert full_flops_per_token(BAICHUAN, 0.5) == 7 * 7_505_973_248


def test_the_budget_fits_and_more_of_it_would_not() -> None:
    room = 44 * GIB
    chosen = choose_qlora_budget(QWEN, 64, H100, room, longest_row=1024, tokens_per_update=20_000)
    assert total(qlora_memory(QWEN, 64, chosen.tokens, chosen.layers_kept)) <= room
    if chosen.layers_kept < 40:
        assert total(qlora_memory(QWEN, 64, chosen.tokens, chosen.layers_kept + 1)) > room
    # One micro-batch fewer, with room for updates that are larger than the mean, would not fit.
    parts = math.ceil(20_000 / chosen.tokens)
    assert total(qlora_memory(QWEN, 64, math.ceil(1.12 * 20_000 / (parts - 1)), 40)) > room
    assert choose_qlora_budget(QWEN, 64, H100, 10 * GIB, 1024, 20_000) is None
    fixed = choose_qlora_budget(QWEN, 64, H100, room, 1024, 20_000, layers_kept=(0, 0), tokens=5000)
    assert fixed == Budget(5000, 0)
    # An update of 900 tokens fills no larger budget than its own longest row.
    assert choose_qlora_budget(QWEN, 64, H100, room, 1024, 900).tokens == 1024
    assert choose_full_budget(BAICHUAN, "3", H100, 2, 20 * GIB, 512, 16_000) is None


def test_two_a100s_need_stage_2_or_3_or_16_bits_and_one_card_holds_a_7b() -> None:
    work = plan_options.Workload(rows=77_250, tokens=330, epochs=2, longest_row=512, rows_per_update=96)
    a100 = named_gpu("a100 80gb")
    options = {option.name: option for option in plan_options.full_options(BAICHUAN, a100, 2, TRAIN, work)}
    assert list(options) == ["none", "1", "2", "3", "2-offload", "3-offload"]
    assert plan_options.choose(list(options.values())).name == "none"
    assert plan_options.choose(list(options.values())[1:]).name in ("2", "3")
    assert options["3-offload"].seconds > options["3"].seconds
    assert work.updates == 2 * 805
    alone = plan_options.choose(plan_options.full_options(BAICHUAN, a100, 1, TRAIN, work))
    assert alone.name == "none"
    # Without DeepSpeed weights are trained in bfloat16, which a V100 has not.
    v100s = plan_options.full_options(BAICHUAN, named_gpu("V100-32G"), 2, TRAIN, work)
    assert [option.name for option in v100s] == ["1", "2", "3", "2-offload", "3-offload"]
    small = plan_options.full_options(BAICHUAN, named_gpu("4090"), 1, TRAIN, work)
    assert next(option for option in small if option.name == "none").budget is None


def test_cards_by_the_names_of_people_and_drivers() -> None:
    assert named_gpu("A100-80G").memory_gib > 75 > named_gpu("A100-40G").memory_gib
    assert named_gpu("rtx 4090").name == named_gpu("4090").name == "RTX-4090"
    assert named_gpu("h100").peak_tflops == 989
    assert named_gpu("Z9000") is None and named_gpu("") is None
    assert found_gpu("NVIDIA A100-SXM4-40GB", 39.4).name == "A100-40G"
    assert found_gpu("NVIDIA H100 80GB HBM3", 79.1).name == "H100-80G"
    assert found_gpu("NVIDIA H100 PCIe", 79.1).name == "H100-PCIE-80G"
    assert found_gpu("NVIDIA A40", 44.9).name == "A40"
    assert found_gpu("NVIDIA RTX A6000", 47.5).name == "A6000"
    assert found_gpu("NVIDIA L40S", 44.4).name == "L40S"
    assert found_gpu("NVIDIA GeForce RTX 4090", 23.6).name == "RTX-4090"
    assert found_gpu("Tesla V100-SXM2-32GB", 31.7).name == "V100-32G"
    assert found_gpu("NVIDIA A10G", 22.0).name == "A10G"
    assert found_gpu("Tesla V100S-PCIE-32GB", 31.7).name == "V100S"
    assert found_gpu("AMD Instinct", 64) is None
    assert found_gpu("NVIDIA GH200 480GB", 95) is None


def test_a_system_text_counts_in_either_spelling() -> None:
    turn, system = {"human": "问" * 4, "assistant": "答" * 4}, "规则" * 50
    messages = [{"content": text} for text in (system, turn["human"], turn["assistant"])]
    expected = plan.estimated_tokens({"messages": messages})
    assert expected == 108 * 0.75 + 3 * 12
    assert plan.estimated_tokens({"conversation": [turn], "system": system}) == expected
    for none in ({}, {"system": None}, {"system": ""}):
        assert plan.estimated_tokens({"conversation": [turn], **none}) == 8 * 0.75 + 2 * 12


def test_rows_are_counted_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turn = {"human": "问" * 40, "assistant": "答" * 8}
    rows = [{"conversation": [turn]}, {"messages": [{"role": "user", "content": "x" * 4000}]}]
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n")
    # 48 characters at 0.75 and two texts' templates of 12; the other is cut to the limit
    assert plan.rows_of_file(str(path), 100) == (2, (48 * 0.75 + 24 + 100) / 2)
    arguments = parse_arguments(["--train_file", str(path), "--max_seq_length", "100", "--num_train_epochs", "3"])
    work = plan.workload(arguments, gpus=2, rows=None, mean_tokens=None)
    assert (work.rows, work.rows_per_update, work.updates) == (2, 16, 3)
    path.write_text("not json\n")
    with pytest.raises(UserError, match="rows.jsonl:1"):
        plan.rows_of_file(str(path), 100)


def test_a_row_longer_than_a_fixed_budget_is_counted() -> None:
    card, room = named_gpu("4090"), plan_options.usable_bytes(named_gpu("4090"))
    budget = choose_qlora_budget(QWEN, 64, card, room, 2048, 8000, tokens=512)
    assert budget.tokens == 512 and budget.layers_kept < 40
    assert total(qlora_memory(QWEN, 64, 2048, budget.layers_kept)) <= room
    assert total(qlora_memory(QWEN, 64, 2048, budget.layers_kept + 1)) > room


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H20", "H20-96G"),
        ("L4", None),
        ("L2", None),
        ("A", None),
        ("4", None),
        ("H200", "H200"),
        ("a100-80", "A100-80G"),
    ],
)
def test_a_short_name_is_a_whole_model(name: str, found: str | None) -> None:
    card = named_gpu(name)
    assert (card and card.name) == found
