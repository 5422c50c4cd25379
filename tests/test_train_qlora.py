"""QLoRA training from the command line on a tiny converted Qwen checkpoint: real NF4, one rank and two.

Two ranks go through finetune.launch and torchrun, are stopped half-way and go on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.arguments import parse_arguments
from finetune.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = REPOSITORY / "qwen_qlora" / "data" / "text_matching_data_train.jsonl"
NUM_ROWS, UPDATES = 44, 6  # 8 rows an update, the last of them 4


@pytest.fixture(scope="module")
def flags(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = tmp_path_factory.mktemp("rows") / "train.jsonl"
    rows.write_text("".join(ROWS.open(encoding="utf-8").readlines()[:NUM_ROWS]), encoding="utf-8")
    config = REPOSITORY / "qwen_qlora" / "config" / "qwen-14b-qlora.json"
    return (
        f"--train_args_file {config} --model_name_or_path {tiny_qwen} --train_file {rows} --learning_rate 2e-3"
        " --gradient_accumulation_steps 2 --per_device_train_batch_size 4 --logging_steps 1 --save_steps 4"
        " --warmup_steps 2 --lora_dropout 0 --tokens_per_micro_batch 300"
    ).split()


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-rank run from start to end, with an evaluation file, and what it printed in log.txt."""
    folder = tmp_path_factory.mktemp("qlora")
    command = [sys.executable, "-m", "qwen_qlora.train_qlora", *flags, "--output_dir", str(folder / "out")]
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "PRICE_PER_HOUR": "3.5"}
        process = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    assert process.returncode == 0, (folder / "log.txt").read_text()
    return folder / "out"


def report_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "train_report.json").read_text(encoding="utf-8"))


def losses_of(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in report_of(output_dir)["history"] if "loss" in entry]


def run_here(flags: Sequence[str], output_dir: Path, *more: str) -> int:
    from finetune.methods import QLORA
    from finetune.training import run_training

    return run_training(parse_arguments([*flags, "--output_dir", str(output_dir), *more]), QLORA)


def test_a_run_leaves_everything_it_promises(finished: Path, tiny_qwen: Path) -> None:
    report = report_of(finished)
    assert (report["status"], report["updates"], report["identity"]["rows_per_update"]) == ("finished", UPDATES, 8)
    losses = losses_of(finished)
    assert len(losses) == UPDATES and losses[-1] < losses[0] - 0.05
    rates = [entry["learning_rate"] for entry in report["history"]]
    assert rates == pytest.approx([0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3])
    assert report["predicted"]["peak_memory_gib"] > 0 and report["cost"] >= 0 and report["versions"]["torch"]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(finished.glob("runs/*/events.out.tfevents.*"))
    assert [path.name for path in finished.glob("checkpoint-*")] == ["checkpoint-6"]
    names = {path.name for path in (finished / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "train_args.json"} <= names
    assert json.loads((finished / "final" / "train_args.json").read_text())["learning_rate"] == 2e-3
    from finetune.identity import check_adapter

    check_adapter(finished / "final", tiny_qwen)


def test_the_log_is_plain_and_tells_the_plan(finished: Path) -> None:
    log = (finished.parent / "log.txt").read_text()
    assert "\r" not in log and "Traceback" not in log and "Warning" not in log
    assert f"plan: {NUM_ROWS} rows" in log and f"{UPDATES} updates of 8 rows" in log
    assert "trained: 139,264 parameters of 374,080" in log
    assert "fp16 is true, float32 is used" in log and "paged_adamw_32bit is not paged" in log
    assert "<|im_start|>user\n" in log.replace("]]", "") and "[[" in log
    lines = [line for line in log.splitlines() if line.startswith(f"{UPDATES}/{UPDATES}  loss")]
    assert len(lines) == 1 and all(word in lines[0] for word in ("lr 2.00e-03", "grad", "tokens/s", "eta", "cost"))
    assert log.strip().splitlines()[-1].startswith(("done:", "report:"))


def test_the_adapter_has_the_last_loss_on_its_rows(finished: Path, flags: list[str], tiny_qwen: Path) -> None:
    """Base plus final/ through peft's own modules and full logits: the loss of the rows fell as the log says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.conversation import encode_rows
    from finetune.rows import read_rows

    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    rows = flags[flags.index("--train_file") + 1]
    samples, _ = encode_rows(tokenizer, read_rows(rows), 1024)

    def mean_loss(model: torch.nn.Module) -> float:
        total, count = 0.0, 0
        for sample in samples:
            labels = torch.tensor([sample.labels])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sample.input_ids])).logits
            total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
            count += int((labels[0, 1:] != -100).sum())
        return total / count

    base = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32)
    losses, before = losses_of(finished), mean_loss(base)
    # 4-bit weights against 32-bit ones, rows of all updates against those of one: close, not equal
    assert before == pytest.approx(losses[0], abs=0.1)
    assert mean_loss(PeftModel.from_pretrained(base, finished / "final")) < losses[-1] + 0.1 < before


def test_a_finished_run_is_left_alone_and_another_one_refused(
    finished: Path, flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run_here(flags, finished) == 0
    assert "already done" in capsys.readouterr().out
    for more, words in (
        (("--lora_rank", "16"), "lora_rank: 64 there, 16 now"),
        (("--gradient_accumulation_steps", "1"), "rows per update: 8 there, 4 now"),
        (("--train_file", str(ROWS)), "training data: .*train.jsonl .* there, .*text_matching_data_train.jsonl .* now"),
    ):
        with pytest.raises(UserError, match=words):
            run_here(flags, finished, *more)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_what_is_missing_is_named_before_anything_is_loaded(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qwen-download"):
        run_here(flags, tmp_path, "--model_name_or_path", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere.jsonl"):
        run_here(flags, tmp_path, "--train_file", str(tmp_path / "nowhere.jsonl"))
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_one_is_refused_before_the_model(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With either method; they differ in the model's loading, which must not begin."""
    from finetune import training
    from finetune.full import full_method

    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("the model would be loaded"))
    file, dangling = tmp_path / "file", tmp_path / "link"
    file.touch()
    dangling.symlink_to(tmp_path / "nowhere")
    whole = parse_arguments([*flags, "--deepspeed", "none", "--output_dir", str(file)])
    with pytest.raises(UserError, match=f"expected a folder .* found: {file}, which is not a folder"):
        training.run_training(whole, full_method(whole))
    for output_dir, found in ((file, file), (file / "a" / "b", file), (dangling, dangling)):
        with pytest.raises(UserError, match=f"{output_dir}: .* found: {found}, which is not a folder. Name another"):
            run_here(flags, output_dir)
    with pytest.raises(UserError, match="/proc/none/out: .* found: No such file or directory. Name another"):
        run_here(flags, Path("/proc/none/out"))
    assert sorted(tmp_path.iterdir()) == [file, dangling]


def test_an_output_folder_without_permission_is_refused(tmp_path: Path) -> None:
    from finetune.prepare import check_output_dir

    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # root may write anywhere
    try:
        for output_dir in (locked, locked / "out"):
            with pytest.raises(UserError, match=f"{output_dir}: .* found: Permission denied. Name another"):
                check_output_dir(output_dir)
    finally:
        if is_root:
            os.seteuid(0)
    check_output_dir(tmp_path / "new" / "out")
    assert not list((tmp_path / "new" / "out").iterdir())


def test_a_rank_says_in_one_line_that_its_output_folder_is_a_file(flags: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "qwen_qlora.train_qlora", *flags, "--output_dir", str(file)]
    command = [sys.executable, "-m", "finetune.launch", *torchrun, *module]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and str(file) in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_the_log_says_that_the_warm_up_is_too_long(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import training

    said = []
    monkeypatch.setattr(training, "say", said.append)
    more = "--warmup_steps 300 --max_steps 2 --save_strategy no --report_to none".split()
    assert run_here(flags, tmp_path, *more) == 0
    (note,) = [line for line in said if "warmup_steps" in line]
    assert (
        "300 warmup_steps, 2 updates: learning rate 0.002 is never reached" in note
        and 'ARGS="--warmup_steps 1"' in note
    )


def test_two_ranks_stopped_and_resumed_have_the_losses_of_one(finished: Path, flags: list[str], tmp_path: Path) -> None:
    output = tmp_path / "two"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "qwen_qlora.train_qlora", *flags, "--gradient_accumulation_steps", "1", "--output_dir", str(output)]
    command = [sys.executable, "-m", "finetune.launch", *torchrun, *module]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed = []
    for line in process.stderr:
        printed.append(line)
        if line.startswith("2/6 "):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, "".join(printed)
    stopped = report_of(output)
    assert stopped["status"] == "interrupted" and 2 <= stopped["updates"] < UPDATES
    assert (output / "loss.png").exists() and (output / f"checkpoint-{stopped['updates']}" / "complete.json").exists()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"going on from {output / 'checkpoint-'}" in again.stderr
    assert losses_of(output) == pytest.approx(losses_of(finished), abs=1e-4)
    assert (report_of(output)["starts"], report_of(output)["tokens"]) == (2, report_of(finished)["tokens"])
    assert report_of(output)["seconds"] > stopped["seconds"]


def test_a_full_disk_is_refused_before_the_first_update(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import saving

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(UserError, match=r"need \d\d MiB, 1 MiB are free.*save_total_limit"):
        run_here(flags, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_a_kill_left_half_written_does_not_count_as_used_disk(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for the run and half a checkpoint more; killed in the second checkpoint, gone on with."""
    from finetune import saving

    output_dir, needed = tmp_path / "out", []
    usage, disk_needed = shutil.disk_usage(tmp_path), saving.disk_needed

    def disk_usage(path: Path) -> object:
        used = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
        return usage._replace(free=64 * 2**20 - used)

    monkeypatch.setattr(saving.shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(saving, "disk_needed", lambda *counts: needed.append(disk_needed(*counts)) or needed[-1])
    more = ["--save_steps", "2", "--report_to", "none", "--max_steps"]
    assert run_here(flags, output_dir, *more, "2") == 0
    shutil.rmtree(output_dir / "final")
    torn = saving.aside_dir(output_dir) / "checkpoint-4"
    torn.mkdir(parents=True)
    (torn / "optimizer.pt").write_bytes(bytes(disk_usage(output_dir).free - needed[-1] // 4))
    assert run_here(flags, output_dir, *more, "4") == 0
    assert saving.is_complete(output_dir / "final") and not torn.parent.exists()


def test_a_run_that_saves_no_checkpoints_needs_disk_for_final_alone(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import room

    needed = []
    monkeypatch.setattr(room.saving, "check_disk", lambda path, size: needed.append(size))
    assert run_here(flags, tmp_path, "--save_strategy", "no", "--max_steps", "1", "--report_to", "none") == 0
    final = sum(path.stat().st_size for path in (tmp_path / "final").glob("adapter_model*"))
    assert final <= needed[0] <= final + 30 * 2**20


def test_fp8_is_refused_where_the_device_has_none(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp8_backward needs a card of the Ada or Hopper generation.*found a CPU"):
        run_here(flags, tmp_path, "--fp8_backward", "true")


def test_a_held_out_part_is_measured(flags: list[str], tmp_path: Path) -> None:
    more = "--eval_split_percentage 20 --eval_steps 2 --max_steps 4 --bf16 true --fp16 false --report_to none".split()
    assert run_here(flags, tmp_path, *more) == 0
    report = report_of(tmp_path)
    measured = {entry["step"]: entry["eval_loss"] for entry in report["history"] if "eval_loss" in entry}
    assert sorted(measured) == [2, 4] and 5 < measured[4] < measured[2]
    assert report["best_checkpoint"] == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "runs").exists()


def test_a_torn_final_is_written_again(finished: Path, flags: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    (output / "final" / "complete.json").write_text("{")
    (output / "final" / "adapter_model.safetensors").write_bytes(b"half")
    started = time.time()
    assert run_here(flags, output, "--eval_split_percentage", "0") == 0
    assert (output / "final" / "adapter_model.safetensors").stat().st_mtime > started - 1
    weights = [(folder / "final" / "adapter_model.safetensors").read_bytes() for folder in (output, finished)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_refused_before_the_model_is_loaded(
    finished: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture, name: str
) -> None:
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("final"))
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    damaged = newest / name
    if name == "trainer_state.json":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{damaged} .*: {newest} is damaged. Copy it again, or remove the folder"):
        run_here(flags, tmp_path / "out", "--eval_split_percentage", "0")
    assert "loading" not in capfd.readouterr().err


def test_another_programs_checkpoints_are_refused_and_stay(flags: list[str], tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "checkpoint-500"
    foreign.mkdir(parents=True)
    (foreign / "adapter_model.bin").write_text("of the original code")
    with pytest.raises(UserError, match="checkpoint-500: expected a folder that this program wrote"):
        run_here(flags, tmp_path / "out")
    assert (foreign / "adapter_model.bin").exists()


def test_no_epochs_are_no_training(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_train_epochs: expected a number above 0, found 0"):
        run_here(flags, tmp_path / "out", "--num_train_epochs", "0", "--max_steps", "-1")
    assert not (tmp_path / "out").exists()
