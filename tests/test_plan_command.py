"""The plan's command line: its tables, its advice, cards found on this machine, refusals."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import plan, plan_options
from finetune.arguments import TrainArguments
from finetune.errors import UserError
from finetune.gpus import named_gpu
from finetune.memory import KNOWN_SHAPES, full_memory, total
from finetune.updates import UpdateDataset

REPOSITORY = Path(__file__).resolve().parent.parent


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


def test_the_disk_is_told_as_needed_and_as_free(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7.0 GB: two checkpoints of 249 M numbers of 12 bytes, and final/ of 4."""
    monkeypatch.setattr(plan, "free_bytes", lambda folder: 3_210_000_000)
    here = str(tmp_path / "not" / "there" / "yet")
    assert "disk: needs 7.0 GB for 1 checkpoint of 3.0 GB, one more" in printed(capsys)
    assert f"GB; 3.2 GB are free in {tmp_path}\n" in printed(capsys, "--output_dir", here)
    alone = printed(capsys, "--output_dir", here, "--save_strategy", "no")
    assert f"disk: needs 1.0 GB for final/; save_strategy is no; 3.2 GB are free in {tmp_path}\n" in alone

    def refuse(folder: str) -> int:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(plan, "free_bytes", refuse)
    assert "choice:" in printed(capsys, "--output_dir", here)


def test_advice_counts_the_rank_that_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--gpu", "4090", "--lora_rank", "1024")
    assert "nothing fits on 1 x RTX-4090" in text and "RTX-4090" not in text.split("Cards on which it fits:")[1]


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


def test_rows_of_another_kind_are_refused_and_long_ones_counted_as_they_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    foreign = tmp_path / "a.jsonl"
    foreign.write_text('{"instruction": "a", "output": "b"}\n')
    refused = run_plan("--method", "full", "--model", "baichuan2-7b", "--gpu", "A100-80G", "--train_file", str(foreign))
    assert refused.returncode == 2 and f"{foreign}:1: not a training row" in refused.stderr
    cut = printed(capsys, "--mean_tokens", "5000", "--max_seq_length", "512")
    assert "rows: 2,000 of about 512 tokens" in cut and "1.0 M tokens" in cut


def test_what_the_experiment_fixes_is_what_does_not_fit(capsys: pytest.CaptureFixture) -> None:
    """The line says what it would take, and the advice not to rent another card for it."""
    fixed = printed(capsys, "--gpu", "4090", "--tokens_per_micro_batch", "65536")
    (line,) = [line for line in fixed.splitlines() if line.endswith("does not fit")][:1]
    assert float(line.split()[8]) > 40 and "set tokens_per_micro_batch to 0" in fixed
    kept = printed(capsys, "--gpu", "4090", "--gradient_checkpointing", "false", "--max_seq_length", "8192")
    (line,) = [line for line in kept.splitlines() if line.endswith("does not fit")][:1]
    assert float(line.split()[8]) > float(line.split()[9]) and "gradient_checkpointing to true" in kept


@pytest.mark.parametrize(("card", "gpus", "stage"), [("H200", 2, "none"), ("H100", 8, "1"), ("A100-80G", 2, "none")])
def test_a_plan_takes_hardly_less_memory_than_the_log_of_its_training(card: str, gpus: int, stage: str) -> None:
    """Updates larger than the budget are cut in two, and keep all gradients beside activations."""
    draw = random.Random(0)
    lengths = [min(512, max(16, int(draw.lognormvariate(5.6, 0.6)))) for _ in range(4000)]
    work = plan_options.Workload(len(lengths), sum(lengths) / len(lengths), 1, 512, 12 * gpus)
    shape = KNOWN_SHAPES["baichuan2-7b"]
    options = plan_options.full_options(shape, named_gpu(card), gpus, TrainArguments(), work)
    (option,) = [option for option in options if option.name == stage]
    samples = [SimpleNamespace(input_ids=range(length), labels=range(length)) for length in lengths]
    largest = UpdateDataset(samples, 12 * gpus, option.budget.tokens, 0, 0, gpus).largest_micro_batches(
        len(lengths) // (12 * gpus)
    )
    assert len(largest) > 1
    logged = max(
        total(full_memory(shape, stage, gpus, tokens, option.budget.layers_kept, count))
        for count, tokens in largest.items()
    )
    assert total(option.parts) > 0.97 * logged
