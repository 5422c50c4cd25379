"""Full-parameter training through make: DeepSpeed's stages on two CPU ranks against one process without DeepSpeed.

Each stage is begun, interrupted in its own way (SIGTERM to the step, a killed rank, another number of ranks, two
machines) and gone on with; the losses of both parts together are those of the undisturbed run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import NOT_COPIED, REPOSITORY
from tests.llm_step import FLAGS, RATE, UPDATES, WARMUP, Step, processes_with
from tests.two_hosts import SSHD, two_hosts

ROWS = REPOSITORY / "llm_code" / "data" / "psychology_data.jsonl"
ON_ONE_RANK = FLAGS.replace("accumulation_steps 2", "accumulation_steps 4")


@pytest.fixture(scope="module")
def settings(tiny_baichuan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a step: llm_env is the Python of the tests."""
    folder = tmp_path_factory.mktemp("llm")
    (folder / "envs").mkdir()
    (folder / "envs" / "llm_env").symlink_to(Path(sys.executable).parent.parent)
    # A copy for this process of the tests: of one clone only one training may run at a time.
    shutil.copytree(REPOSITORY, folder / "checkout", ignore=lambda _, names: NOT_COPIED.intersection(names))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(ROWS.open(encoding="utf-8").readlines()[:44]), encoding="utf-8")
    return {
        **os.environ,
        "ENVS_DIR": str(folder / "envs"),
        "BAICHUAN_MODEL_DIR": str(tiny_baichuan),
        "BAICHUAN_TRAIN_FILE": str(rows),
        "PYTHONUNBUFFERED": "1",
        "CHECKOUT": str(folder / "checkout"),
    }


def run(output_dir: Path, settings: dict[str, str], stage: str, flags: str = FLAGS, **more) -> str:
    """A run from here to its end; its log."""
    step = Step(output_dir, settings, stage, flags, **more)
    assert step.status() == 0, step.text()
    return step.text()


def history(output_dir: Path) -> dict[int, dict[str, float]]:
    report = json.loads((output_dir / "train_report.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry for entry in report["history"] if "loss" in entry}


def losses(output_dir: Path) -> list[float]:
    found = history(output_dir)
    return [found[step]["loss"] for step in range(1, UPDATES + 1)]


@pytest.fixture(scope="module")
def reference(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process without DeepSpeed, never interrupted."""
    output_dir = tmp_path_factory.mktemp("reference") / "out"
    run(output_dir, settings, "none", ON_ONE_RANK, BAICHUAN_GPUS="0")
    return output_dir


def check_run(output_dir: Path, reference: Path, method: str) -> None:
    """Losses and gradients of the undisturbed run, the JSON's learning rate, one checkpoint, nothing left over."""
    found, expected = history(output_dir), history(reference)
    assert losses(output_dir) == pytest.approx(losses(reference), abs=1e-3)
    for step in range(1, UPDATES + 1):
        assert found[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=0.02)
    report = json.loads((output_dir / "train_report.json").read_text(encoding="utf-8"))
    assert report["status"] == "finished" and report["method"].endswith(method) and report["starts"] == 2
    assert [path.name for path in output_dir.glob("checkpoint-*")] == [f"checkpoint-{UPDATES}"]
    assert not (output_dir / ".saving").exists()


def check_nothing_left(step: Step) -> None:
    assert not step.ranks()
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{step.port}_*"))


def warmup_then_cosine(step: int) -> float:
    """The rate of update `step` by its formula: linear from 0, then half a cosine."""
    import math

    done = step - 1
    if done < WARMUP:
        return RATE * done / WARMUP
    return RATE * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (UPDATES - WARMUP)))


def test_one_process_trains_and_final_has_the_trained_logits(reference: Path, tiny_baichuan: Path) -> None:
    """final/ through plain transformers, against the raw weights of the last checkpoint with a head normalised here."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rates = [entry["learning_rate"] for _, entry in sorted(history(reference).items())]
    assert rates == pytest.approx([warmup_then_cosine(step) for step in range(1, UPDATES + 1)])
    assert losses(reference)[-1] < losses(reference)[0] - 0.5
    final = reference / "final"
    names = {path.name for path in final.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} <= names
    assert {"train_report.json", "train_args.json", "TRAINED.md", "Notice.txt", "complete.json"} <= names
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in final.iterdir())
    raw = load_file(reference / f"checkpoint-{UPDATES}" / "model.safetensors")
    rows = raw["lm_head.weight"].norm(dim=1)
    assert (rows - 1).abs().max() > 1e-3  # in training the rows drift
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert torch.allclose(model.lm_head.weight.norm(dim=1), torch.ones(len(rows)), atol=1e-6)
    ids = torch.tensor([tokenizer("今天天气很好，我们一起去公园散步吧。")["input_ids"]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = hidden @ (raw["lm_head.weight"] / rows[:, None]).T
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    other = AutoModelForCausalLM.from_pretrained(tiny_baichuan, dtype=torch.float32)
    assert not torch.allclose(model.model.norm.weight, other.model.norm.weight)


def train_here(settings: dict[str, str], output_dir: Path, flags: str) -> int:
    """A run in this process, without DeepSpeed; its status."""
    from finetune.arguments import parse_arguments
    from finetune.full import full_method
    from finetune.training import run_training

    config = REPOSITORY / "llm_code" / "training_config" / "baichuan2_config.json"
    paths = ["--model_name_or_path", settings["BAICHUAN_MODEL_DIR"], "--output_dir", str(output_dir)]
    rows = ["--train_file", settings["BAICHUAN_TRAIN_FILE"]]
    flags = f"--train_args_file {config} {flags} --deepspeed none"
    arguments = parse_arguments([*flags.split(), *paths, *rows])
    return run_training(arguments, full_method(arguments))


def test_16_bit_weights_train_like_32_bit_ones_and_go_on_exactly(
    settings: dict[str, str], reference: Path, tmp_path: Path
) -> None:
    """One process, bfloat16 throughout: close to the float32 run; a checkpoint goes on with the very same losses."""

    def train(output_dir: Path) -> None:
        assert train_here(settings, output_dir, f"{ON_ONE_RANK} --save_total_limit 9 --bf16 true") == 0

    train(tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(reference), abs=0.02)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "rest" / "checkpoint-6")
    train(tmp_path / "rest")
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")


def test_finalizing_and_training_at_the_same_time_leave_each_others_work(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finalized while the second checkpoint is half-written; cleared by a training's start while it finalizes."""
    from finetune import saving
    from finetune.trainer import UpdateTrainer
    from llm_code import finalize

    output_dir, base_dir = tmp_path / "out", Path(settings["BAICHUAN_MODEL_DIR"])
    save_optimizer, copy_weights = UpdateTrainer._save_optimizer_and_scheduler, finalize.copy_weights

    def save_and_finalize(trainer: UpdateTrainer, folder: str) -> None:
        if trainer.state.global_step == 4:
            final = finalize.write_final(output_dir / "checkpoint-2", base_dir, output_dir)
            assert saving.read_marker(final)["step"] == 2
            assert not (output_dir / ".finalizing").exists()
        save_optimizer(trainer, folder)

    def copy_and_clear(*paths: Path) -> None:
        copy_weights(*paths)
        saving.clear_aside(output_dir)

    monkeypatch.setattr(UpdateTrainer, "_save_optimizer_and_scheduler", save_and_finalize)
    flags = f"{ON_ONE_RANK} --max_steps 4 --save_steps 2"
    assert train_here(settings, output_dir, flags) == 0
    assert saving.read_marker(output_dir / "final")["step"] == 4
    monkeypatch.setattr(finalize, "copy_weights", copy_and_clear)
    finalize.write_final(output_dir / "checkpoint-4", base_dir, output_dir)
    assert (output_dir / "final" / "model.safetensors").exists()
    assert not list(output_dir.glob(".*"))


def test_a_checkpoint_that_training_removes_while_it_is_copied_is_no_final(
    settings: dict[str, str], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.errors import UserError
    from llm_code import finalize

    checkpoint, copy_weights = tmp_path / "checkpoint-2", finalize.copy_weights

    def copy_and_rotate(*paths: Path) -> None:
        copy_weights(*paths)
        shutil.rmtree(checkpoint)

    def rotate_and_copy(*paths: Path) -> None:
        shutil.rmtree(checkpoint)
        shutil.copyfile(checkpoint / "model-00002-of-00002.safetensors", paths[-1] / "model-00002-of-00002.safetensors")

    for copy in (copy_and_rotate, rotate_and_copy):
        shutil.copytree(reference / f"checkpoint-{UPDATES}", checkpoint)
        monkeypatch.setattr(finalize, "copy_weights", copy)
        with pytest.raises(UserError, match="checkpoint-2 was removed while it was copied"):
            finalize.write_final(checkpoint, Path(settings["BAICHUAN_MODEL_DIR"]), tmp_path)
        assert not list(tmp_path.iterdir())


def test_two_ranks_without_deepspeed_stop_at_sigterm_saved_and_go_on(
    settings: dict[str, str], reference: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "out"
    step = Step(output_dir, settings, "none", BAICHUAN_GPUS="0,1")
    step.wait_for_update(2)
    os.kill(run_step_of(step), signal.SIGTERM)
    assert step.status() == 143, step.text()
    assert "Traceback" not in step.text() and "different weights" not in step.text()
    assert not processes_with(f"BAICHUAN_OUTPUT_DIR={output_dir}")
    log = run(output_dir, settings, "auto", BAICHUAN_GPUS="0,1")
    assert "auto: none (" in log and "was written with it" in log and "different weights" not in log
    check_run(output_dir, reference, "without DeepSpeed")


def test_stage_1_stops_at_sigterm_saved_and_goes_on(
    settings: dict[str, str], reference: Path, tmp_path: Path, deepspeed_kernels: dict[str, str]
) -> None:
    output_dir = tmp_path / "out"
    step = Step(output_dir, settings, "1")
    step.wait_for_update(2)
    assert len(step.ranks()) == 2
    os.kill(run_step_of(step), signal.SIGTERM)
    assert step.status() == 143, step.text()
    assert "Traceback" not in step.text()
    check_nothing_left(step)
    saved = [path.name for path in output_dir.glob("checkpoint-*")]
    assert len(saved) == 1 and int(saved[0].partition("-")[2]) < UPDATES
    log = run(output_dir, settings, "auto")
    assert f"auto: 1 ({output_dir / saved[0]} was written with it)" in log and f"{saved[0]}\n" in log
    check_run(output_dir, reference, "stage 1")


def run_step_of(step: Step) -> int:
    """The process of scripts/run_step.py, to which `make stop` sends SIGTERM."""
    found = []
    for process in processes_with(f"MASTER_PORT={step.port}"):
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"run_step.py") for word in words):
            found.append(process)
    return min(found)


def test_stage_2_ends_within_30_seconds_of_a_killed_rank(
    settings: dict[str, str], reference: Path, tmp_path: Path, deepspeed_kernels: dict[str, str]
) -> None:
    output_dir = tmp_path / "out"
    step = Step(output_dir, settings, "2")
    step.wait_for_update(4)
    os.kill(step.ranks()[-1], signal.SIGKILL)
    killed = time.monotonic()
    assert step.status() == 137, step.text()
    assert time.monotonic() - killed < 30
    assert "was killed, perhaps for lack of main memory" in step.text()
    check_nothing_left(step)
    run(output_dir, settings, "2")
    check_run(output_dir, reference, "stage 2")


def test_stage_3_goes_on_with_another_number_of_ranks(
    settings: dict[str, str], reference: Path, tmp_path: Path, deepspeed_kernels: dict[str, str]
) -> None:
    """Also without 16-bit gathering: final/ is put together from the states of the ranks."""
    output_dir, config = tmp_path / "out", tmp_path / "stage_3.json"
    text = (REPOSITORY / "llm_code" / "deepspeed_config" / "deepspeed_stage_3_config.json").read_text()
    config.write_text(text.replace('model_save": true', 'model_save": false'))
    flags = f"{FLAGS} --deepspeed {config}"
    step = Step(output_dir, settings, "3", flags)
    step.wait_for_update(2)
    os.kill(run_step_of(step), signal.SIGTERM)
    assert step.status() == 143, step.text()
    one_rank = flags.replace("accumulation_steps 2", "accumulation_steps 4")
    log = run(output_dir, settings, "3", one_rank, BAICHUAN_GPUS="0")
    assert "it was written by 2 ranks, these are 1: its states, " in log
    check_run(output_dir, reference, "stage 3")
    assert not list((output_dir / f"checkpoint-{UPDATES}").glob("*.safetensors"))
    check_same_weights(output_dir / "final", reference / "final")
    # the walkthrough's copying by hand, from a checkpoint that has no weights of its own
    shutil.rmtree(output_dir / "final")
    command = ["make", "baichuan-finalize"]
    variables = {**settings, "BAICHUAN_OUTPUT_DIR": str(output_dir)}
    done = subprocess.run(command, cwd=settings["CHECKOUT"], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checked: LlamaForCausalLM, " in done.stdout and f"checkpoint-{UPDATES}" in done.stdout
    check_same_weights(output_dir / "final", reference / "final", atol=0.01)  # in the base's bfloat16


def check_same_weights(folder: Path, other: Path, atol: float = 2e-4) -> None:
    import torch
    from safetensors import safe_open

    from finetune.tensor_files import tensor_places

    places, others = tensor_places(folder), tensor_places(other)
    assert set(places) == set(others)
    for name, place in places.items():
        with safe_open(place.file, "pt") as ours, safe_open(others[name].file, "pt") as theirs:
            assert torch.allclose(ours.get_tensor(name).float(), theirs.get_tensor(name).float(), atol=atol), name


def test_stage_2_with_offloading(
    settings: dict[str, str], reference: Path, tmp_path: Path, deepspeed_kernels: dict[str, str]
) -> None:
    output_dir = tmp_path / "out"
    step = Step(output_dir, settings, "2-offload")
    step.wait_for_update(2)
    os.kill(run_step_of(step), signal.SIGTERM)
    assert step.status() == 143, step.text()
    log = run(output_dir, settings, "2-offload", ON_ONE_RANK, BAICHUAN_GPUS="0")
    assert "it was written by 2 ranks, these are 1: its states, " in log
    check_run(output_dir, reference, "stage 2-offload")


@pytest.mark.skipif(not SSHD or not shutil.which("ssh"), reason="openssh is not installed")
def test_stage_3_with_offloading_on_two_machines(
    settings: dict[str, str], reference: Path, tmp_path: Path, deepspeed_kernels: dict[str, str]
) -> None:
    """HOSTFILE with one rank on each of two machines; stopped, then gone on with on this machine alone."""
    output_dir = tmp_path / "out"
    with FileLock(Path("/tmp") / "finetune-two-hosts.lock"), two_hosts(tmp_path) as hosts:
        hostfile = tmp_path / "hosts"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
        more = {**hosts.environment, "HOSTFILE": str(hostfile)}
        step = Step(output_dir, settings, "3-offload", prefix=hosts.machine_1, **more)
        step.wait_for_update(2)
        assert len(step.ranks()) == 2
        if hosts.kind == "namespaces":
            assert len({os.readlink(f"/proc/{rank}/ns/net") for rank in step.ranks()}) == 2
        os.kill(run_step_of(step), signal.SIGTERM)
        assert step.status() == 143, step.text()
        check_nothing_left(step)
    run(output_dir, settings, "3-offload")
    check_run(output_dir, reference, "stage 3-offload")
