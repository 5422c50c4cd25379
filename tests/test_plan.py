"""The plan's arithmetic against sums written out by hand and against what an H100 measured; its command line."""

import json
import math
import subprocess
import sys
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
    Budget,
    choose_full_budget,
    choose_qlora_budget,
    full_flops_per_token,
    full_tokens_per_second,
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


def test_two_a100s_need_stage_3_or_better_and_one_card_holds_a_7b() -> None:
    work = plan_options.Workload(rows=77_250, tokens=330, epochs=2, longest_row=512, rows_per_update=96)
    a100 = named_gpu("a100 80gb")
    options = {option.name: option for option in plan_options.full_options(BAICHUAN, a100, 2, TRAIN, work)}
    assert list(options) == ["1", "2", "3", "2-offload", "3-offload"]
    assert plan_options.choose(list(options.values())).name in ("2", "3")
    assert options["3-offload"].seconds > options["3"].seconds
    assert work.updates == 2 * 805
    alone = plan_options.choose(plan_options.full_options(BAICHUAN, a100, 1, TRAIN, work))
    assert alone.name == "none"
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


def run_plan(*flags: str, price: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-m", "finetune.plan", *flags]
    environment = {"PATH": "/usr/bin:/bin", "PRICE_PER_HOUR": price}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_the_command_line_prints_the_tables() -> None:
    flags = "--method full --model baichuan2-7b --gpu A100-80G --num_gpus 2 --rows 77250 --mean_tokens 330".split()
    result = run_plan(*flags, "--max_seq_length", "512", price="10")
    assert result.returncode == 0, result.stderr
    assert all(
        word in result.stdout for word in ("3-offload", "<- choice", "gradients", "14 hours", "disk:", "price: 10")
    )
    assert not any(name in result.stderr for name in ("| torch", "transformers", "numpy"))


def test_the_command_line_says_what_to_do_when_nothing_fits() -> None:
    result = run_plan("--model", "Qwen-14B-Chat", "--gpu", "T4", "--rows", "100", "--mean_tokens", "50")
    assert result.returncode == 1
    assert "nothing fits on 1 x T4" in result.stdout and "A40" in result.stdout
    unknown = run_plan("--model", "qwen-14b", "--gpu", "A1000-80G", "--rows", "100", "--mean_tokens", "50")
    assert unknown.returncode == 2 and "did you mean `A100-80G`" in unknown.stderr
    assert "qwen-7b" in run_plan("--model", "nowhere").stderr


def printed(capsys: pytest.CaptureFixture, *more: str) -> str:
    flags = ["--model", "qwen-14b", "--gpu", "A40", "--rows", "2000", "--mean_tokens", "160"]
    plan.main([*flags, "--train_args_file", str(REPOSITORY / "qwen_qlora/config/qwen-14b-qlora.json"), *more])
    return capsys.readouterr().out


def test_the_plan_follows_what_the_experiment_fixes(capsys: pytest.CaptureFixture) -> None:
    plain = printed(capsys)
    short = printed(capsys, "--max_steps", "10")
    assert "max_steps 10, " in short and ": 10 updates" in short
    assert "at most 1,024 tokens" in printed(capsys, "--tokens_per_micro_batch", "1024")
    assert "0 of 40 layers not recomputed" in printed(capsys, "--recompute_layers", "40")
    assert "rows: 1,000 of" in printed(capsys, "--eval_split_percentage", "50")
    limited = printed(capsys, "--memory_limit_gib", "24")
    needed = [float(line.split()[8]) for line in limited.splitlines() if "<- choice" in line]
    assert needed and needed[0] <= 24 and f"{24 * 0.94:.1f}" in limited
    smaller = printed(capsys, "--optim", "paged_adamw_8bit")
    assert "of 3.0 GB" in plain and "of 1.5 GB" in smaller  # 249 M numbers of 6 bytes, not of 12
    assert "the best one" in printed(capsys, "--eval_split_percentage", "5")


def test_a_row_longer_than_a_fixed_budget_is_counted() -> None:
    card, room = named_gpu("4090"), plan_options.usable_bytes(named_gpu("4090"))
    budget = choose_qlora_budget(QWEN, 64, card, room, 2048, 8000, tokens=512)
    assert budget.tokens == 512 and budget.layers_kept < 40
    assert total(qlora_memory(QWEN, 64, 2048, budget.layers_kept)) <= room
    assert total(qlora_memory(QWEN, 64, 2048, budget.layers_kept + 1)) > room


def test_advice_counts_the_rank_that_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--gpu", "4090", "--lora_rank", "1024")
    assert "nothing fits on 1 x RTX-4090" in text and "RTX-4090" not in text.split("Cards on which it fits:")[1]


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


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/bash\necho '{text}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_cards_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA A100-SXM4-80GB, 81920")
    assert plan.gpus_here() == (named_gpu("A100-80G"), 1)
    fake_nvidia_smi(tmp_path, monkeypatch, "No devices were found", 6)
    assert plan.gpus_here() == (None, 0)
    fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA vGPU-32GB, 32768")
    with pytest.raises(UserError, match="vGPU-32GB is not a card known here.*GPU=A40"):
        plan.gpus_here()


@pytest.mark.parametrize(
    ("line", "name", "gib", "like"),
    [
        ("NVIDIA GeForce RTX 4090, 49140", "RTX-4090-48G", 47.4, "4090"),  # as its makers in China solder it
        ("NVIDIA H20-3e, 143771", "H20-140G", 139.8, "H20"),
        ("NVIDIA GeForce RTX 4090, 24564", "RTX-4090", 23.5, "4090"),
        ("NVIDIA H100 80GB HBM3, 81559", "H100-80G", 79.2, "H100"),
    ],
)
def test_a_card_found_has_its_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, name: str, gib: float, like: str
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, line)
    gpu, _ = plan.gpus_here()
    assert gpu.memory_gib == pytest.approx(gib, abs=0.05)
    assert gpu == replace(named_gpu(like), name=name, memory_gib=gpu.memory_gib)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("NVIDIA GH200 480GB, 97871", "NVIDIA GH200 480GB is not a card known here"),
        ("NVIDIA GB10, [N/A]", r"nvidia-smi tells no memory of NVIDIA GB10: \[N/A\]. Plan with a similar one"),
    ],
)
def test_a_card_that_cannot_be_planned_for_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, line)
    with pytest.raises(UserError, match=message):
        plan.gpus_here()


@pytest.mark.parametrize("text", ["2,82", "-1", "nan"])
def test_a_price_is_an_amount(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRICE_PER_HOUR", text)
    with pytest.raises(UserError, match="PRICE_PER_HOUR: expected an amount"):
        plan.main(["--model", "qwen-14b", "--gpu", "A40", "--rows", "10", "--mean_tokens", "9"])


@pytest.mark.parametrize("flags", [["--rows", "-5", "--mean_tokens", "9"], ["--rows", "5", "--mean_tokens", "nan"]])
def test_impossible_rows_are_refused(flags: list[str]) -> None:
    with pytest.raises(UserError, match="must be at least 1, found"):
        plan.main(["--model", "qwen-14b", "--gpu", "A40", *flags])


def warmup_notes(capsys: pytest.CaptureFixture, *flags: str) -> list[str]:
    plan.main(list(flags))
    return [line for line in capsys.readouterr().out.splitlines() if "warmup_steps" in line]


def test_shipped_warm_ups_longer_than_the_bundled_rows_are_said(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    qwen = "--model qwen-14b --gpu A40 --train_args_file qwen_qlora/config/qwen-14b-qlora.json".split()
    (note,) = warmup_notes(capsys, *qwen)
    assert (
        "300 warmup_steps, 125 updates: learning rate 5e-05 is never reached" in note
        and 'ARGS="--warmup_steps 4"' in note
    )
    baichuan = "--method full --model baichuan2-7b --gpu A100-80G --num_gpus 2 --train_args_file".split()
    (note,) = warmup_notes(capsys, *baichuan, "llm_code/training_config/baichuan2_config.json")
    assert (
        "200 warmup_steps, 8 updates: learning rate 1e-05 is never reached" in note
        and 'ARGS="--warmup_steps 1"' in note
    )
    # Also where nothing fits, and not where the advice was taken or the walkthrough's own rows are meant.
    assert len(warmup_notes(capsys, *qwen, "--gpu", "T4")) == 1
    for more in (["--warmup_steps", "4"], ["--rows", "77250", "--mean_tokens", "74"]):
        assert not warmup_notes(capsys, *qwen, *more)


@pytest.mark.parametrize(
    ("warmup", "updates", "words"),
    [
        (0, 100, None),
        (50, 100, None),
        (51, 100, "is reached late"),
        (99, 100, "is reached late"),
        (100, 100, "is never reached"),
        (300, 0, None),
    ],
)
def test_a_warm_up_is_compared_with_the_updates(warmup: int, updates: int, words: str | None) -> None:
    note = plan_options.warmup_note(TrainArguments(warmup_steps=warmup), updates)
    assert (note is None) if words is None else words in note


def test_the_advised_warm_up_reaches_the_rate() -> None:
    for updates in range(1, 200):
        advised = int(plan_options.warmup_note(TrainArguments(warmup_steps=300), updates).split('"')[1].split()[1])
        assert plan_options.warmup_note(TrainArguments(warmup_steps=advised), updates) is None
        assert advised >= 1 or updates == 1
    assert plan_options.warmup_note(TrainArguments(warmup_steps=300, lr_scheduler_type="constant"), 10) is None
