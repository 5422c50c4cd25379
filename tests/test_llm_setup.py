"""What stands around full-parameter training: DeepSpeed files, launch script, choice of a stage, hostfile."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import saving
from finetune.arguments import parse_arguments
from finetune.errors import UserError
from finetune.full import full_method
from finetune.gpus import named_gpu
from finetune.hosts import read_hostfile, remote_command
from finetune.memory import KNOWN_SHAPES, STAGES, full_saved_bytes
from finetune.zero import check_final_weights, read_zero_config, stage_of
from llm_code.choose_stage import choose_stage
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "llm_code" / "deepspeed_config"
CONFIG = REPOSITORY / "llm_code" / "training_config" / "baichuan2_config.json"
FILES = {stage: FOLDER / f"deepspeed_stage_{stage.replace('-', '_')}_config.json" for stage in STAGES[1:]}


# ---- DeepSpeed's files ----


def test_every_stage_has_a_file_that_is_that_stage_and_they_differ() -> None:
    assert sorted(FOLDER.iterdir()) == sorted(FILES.values())
    assert {stage: stage_of(path) for stage, path in FILES.items()} == {stage: stage for stage in FILES}
    assert len({path.read_text() for path in FILES.values()}) == len(FILES)
    assert stage_of(None) == stage_of("") == "none"


@pytest.mark.parametrize("stage", FILES)
def test_what_the_trainer_knows_is_left_to_it(stage: str) -> None:
    config = read_zero_config(FILES[stage])
    known = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[name] for name in known} == {"auto"}
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert "optimizer" not in config and "scheduler" not in config


def test_a_block_that_would_win_over_the_training_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match="`scheduler`, which would win over the training JSON"):
        stage_of(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 4}}))
    with pytest.raises(UserError, match="expected zero_optimization with a stage of 1, 2, 3"):
        stage_of(path)
    path.write_text(json.dumps({"zero_optimization": None}))
    with pytest.raises(UserError, match="`zero_optimization` must be an object"):
        stage_of(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": None}}))
    assert stage_of(path) == "2"
    path.write_text('{"_": "阶段"}', encoding="gbk")
    with pytest.raises(UserError, match="DeepSpeed file in UTF-8, found byte"):
        stage_of(path)
    path.write_text("{")
    with pytest.raises(UserError, match="zero.json:1: not JSON"):
        stage_of(path)
    with pytest.raises(UserError, match="deepspeed_config"):
        stage_of(tmp_path / "nowhere.json")


def test_the_readme_explains_every_key_of_the_files() -> None:
    def keys(config: dict) -> set[str]:
        return set(config).union(*(keys(value) for value in config.values() if isinstance(value, dict)))

    text = (REPOSITORY / "llm_code" / "README.md").read_text(encoding="utf-8")
    used = set().union(*(keys(read_zero_config(path)) for path in FILES.values()))
    assert not [key for key in used if f"`{key}`" not in text]


def test_the_training_json_has_the_walkthroughs_values() -> None:
    """Its own run: 12 rows a card, 4 times, cosine, 2 epochs. What differs, the README says."""
    values = json.loads(CONFIG.read_text())
    walkthrough = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "max_seq_length": 512,
        "logging_steps": 10,
        "save_steps": 100,
        "save_total_limit": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 200,
        "optim": "adamw_hf",
        "dataloader_num_workers": 5,
        "max_grad_norm": 1.0,
    }
    assert {key: values[key] for key in walkthrough} == walkthrough
    arguments = parse_arguments(["--train_args_file", str(CONFIG)])
    assert arguments.train.optim == "adamw_torch" and any("adamw_hf is gone" in text for text in arguments.notices)
    assert stage_of(REPOSITORY / arguments.train.deepspeed) == "3"
    without = parse_arguments(["--train_args_file", str(CONFIG), "--deepspeed", "none"])
    assert without.train.deepspeed is None


def test_saved_bytes_by_hand() -> None:
    p = KNOWN_SHAPES["baichuan2-7b"].parameters
    # Without DeepSpeed: weights and two moments, 2 bytes each.
    assert full_saved_bytes(p, "none") == (6 * p, 2 * p, 2 * p)
    # Master weights and moments, 4 bytes each; the 16-bit weights as a model, in stages 1 and 2 also as a state.
    assert full_saved_bytes(p, "2") == (16 * p, 2 * p, 4 * p)
    assert full_saved_bytes(p, "3-offload") == (14 * p, 2 * p, 6 * p)


# ---- the launch script ----


def command_of(folder: Path, cards: int = 0, *flags: str, **settings: str) -> list[str]:
    """What a dry run prints, as words, on a machine where nvidia-smi lists so many A100s."""
    result = launch(folder, cards, *flags, **settings)
    assert result.returncode == 0, result.stderr
    prefix, _, command = result.stdout.strip().partition(": ")
    assert prefix == "-----> baichuan-train"
    return shlex.split(command)


def launch(folder: Path, cards: int, *flags: str, **settings: str) -> subprocess.CompletedProcess:
    if not cards and shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has cards")
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    if cards:
        lines = "".join("NVIDIA A100-SXM4-80GB, 81920\\n" for _ in range(cards))
        listed = "".join(f"GPU {number}: NVIDIA A100-SXM4-80GB\\n" for number in range(cards))
        body = f"case $1 in --list-gpus) printf '{listed}' ;; *) printf '{lines}' ;; esac"
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (programs / "nvidia-smi").chmod(0o755)
    (programs / "python3").unlink(missing_ok=True)
    (programs / "python3").symlink_to(sys.executable)
    kept = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
    environment = {**kept, "PATH": f"{programs}:/usr/bin:/bin", "ENVS_DIR": str(folder), "DRY_RUN": "1", **settings}
    script = REPOSITORY / "llm_code" / "train_ft.sh"
    return subprocess.run(["bash", str(script), *flags], env=environment, capture_output=True, text=True)


def test_deepspeeds_launcher_gets_cards_and_port(tmp_path: Path) -> None:
    command = command_of(tmp_path, 4, BAICHUAN_GPUS="1,3", MASTER_PORT="7000", DEEPSPEED_STAGE="2-offload")
    start = "python -m finetune.launch deepspeed --quiet --include localhost:1,3 --master_port 7000 --no_local_rank"
    assert command[: len(start.split())] == start.split()
    assert command[command.index("--deepspeed") + 1] == str(FILES["2-offload"].relative_to(REPOSITORY))
    on_cpu = command_of(tmp_path / "cpu", 0, BAICHUAN_GPUS="0,1,2", DEEPSPEED_STAGE="1")
    assert on_cpu[on_cpu.index("--num_gpus") + 1] == "3"


def test_paths_become_flags_and_the_persons_flags_come_last(tmp_path: Path) -> None:
    settings = {"BAICHUAN_MODEL_DIR": "/m", "BAICHUAN_TRAIN_FILE": "t.jsonl", "BAICHUAN_OUTPUT_DIR": "/o"}
    command = command_of(tmp_path, 0, "--output_dir", "/o p", BAICHUAN_GPUS="0", DEEPSPEED_STAGE="none", **settings)
    flags = "--model_name_or_path /m --train_file t.jsonl --output_dir /o --deepspeed none --output_dir".split()
    assert command[:3] == ["python", "-m", "llm_code.train"] and command[5:] == [*flags, "/o p"]


def test_none_starts_a_process_for_each_card_of_one_machine(tmp_path: Path) -> None:
    command = command_of(tmp_path, 4, BAICHUAN_GPUS="1,3", DEEPSPEED_STAGE="none")
    start = "python -m finetune.launch torchrun --standalone --nproc_per_node 2 -m llm_code.train --train_args_file"
    assert command[: len(start.split())] == start.split() and command[-2:] == ["--deepspeed", "none"]
    (tmp_path / "hosts").write_text("worker-1 slots=2\n")
    result = launch(tmp_path, 2, HOSTFILE=str(tmp_path / "hosts"), DEEPSPEED_STAGE="none")
    assert result.returncode == 2 and "DEEPSPEED_STAGE=none is for the cards of one machine" in result.stderr


@pytest.mark.parametrize(
    "cards, settings, expected",
    [
        (
            1,
            {"BAICHUAN_GPUS": "0,1"},
            "BAICHUAN_GPUS=0,1 names card 1, this machine has 1, counted from 0: set BAICHUAN_GPUS=0",
        ),
        (2, {"BAICHUAN_GPUS": "1,2"}, "names card 2, this machine has 2, counted from 0: set BAICHUAN_GPUS=0,1"),
        (2, {"BAICHUAN_GPUS": "0,a"}, "BAICHUAN_GPUS must be numbers of cards separated by commas"),
        (1, {"BAICHUAN_GPUS": "0", "DEEPSPEED_STAGE": "4"}, "DEEPSPEED_STAGE must be auto, none, 1, 2, 3"),
        (1, {"HOSTFILE": "/nowhere/hosts"}, "HOSTFILE /nowhere/hosts: No such file or directory. Name a file of lines"),
        (1, {"HOSTFILE": "README.md"}, "README.md:3: expected a new machine as NAME slots=CARDS, found: "),
    ],
)
def test_what_cannot_be_started_is_refused_in_a_line(tmp_path: Path, cards: int, settings: dict, expected: str) -> None:
    result = launch(tmp_path, cards, **settings)
    assert result.returncode == 2 and expected in result.stderr and result.stderr.count("\n") == 1


def test_a_hostfile_goes_to_every_machine(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\nworker-1 slots=8\nworker-2 slots=8\n")
    command = command_of(tmp_path, 8, HOSTFILE=str(hostfile), MASTER_PORT="7000", DEEPSPEED_STAGE="3")
    start = (
        f"python -m finetune.hosts --hostfile {hostfile} --master_port 7000 -- --no_local_rank --module llm_code.train"
    )
    assert command[: len(start.split())] == start.split()


@pytest.mark.parametrize("target", ["baichuan-plan", "baichuan-train"])
def test_machines_are_counted_where_the_boxs_own_python_is_too_old(tmp_path: Path, target: str) -> None:
    """It runs scripts/ alone; what lies in finetune/ runs with llm_env's."""
    (tmp_path / "hosts").write_text("worker-1 slots=8\nworker-2 slots=4\n")
    environment, programs = tmp_path / "llm_env" / "bin", tmp_path / "bin"
    for folder in (environment, programs):
        folder.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)
    old = f'#!/bin/sh\n[ "$1" != -m ] || {{ echo too old >&2; exit 2; }}\nexec {sys.executable} "$@"\n'
    (programs / "python3").write_text(old)
    (programs / "python3").chmod(0o755)
    values = [f"HOSTFILE={tmp_path / 'hosts'}", f"ENVS_DIR={tmp_path}", "DEEPSPEED_STAGE=3", "DRY_RUN=1"]
    values += ["BAICHUAN_MODEL_DIR=/m", "BAICHUAN_OUTPUT_DIR=/o"]
    paths = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(["make", target, *values], cwd=REPOSITORY, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("--num_gpus 12" if target == "baichuan-plan" else f"--hostfile {tmp_path / 'hosts'}") in done.stdout


def test_auto_says_what_it_chose_and_why(tmp_path: Path) -> None:
    """Two 80 GB cards hold no stage 1 (walkthrough, note 2); one holds the 7B in 16 bits."""
    model = tmp_path / "Baichuan2-7B-Chat"
    settings = {"BAICHUAN_MODEL_DIR": str(model), "DEEPSPEED_STAGE": "auto"}
    two = launch(tmp_path, 2, BAICHUAN_GPUS="0,1", **settings)
    assert two.returncode == 0, two.stderr
    assert "DEEPSPEED_STAGE=auto: none (" in two.stderr and "torchrun" in two.stdout
    assert "GiB on each A100-80G, about" in two.stderr and re.search("3-offload (would take|needs)", two.stderr)
    (tmp_path / "hosts").write_text("worker-1 slots=2\nworker-2 slots=2\n")
    four = launch(tmp_path, 2, HOSTFILE=str(tmp_path / "hosts"), **settings)
    assert re.search(r"DEEPSPEED_STAGE=auto: [123] \(", four.stderr) and "none would take" not in four.stderr
    one = launch(tmp_path, 1, BAICHUAN_GPUS="0", **settings)
    assert "DEEPSPEED_STAGE=auto: none (" in one.stderr and " --deepspeed none" in one.stdout


def test_auto_takes_no_offloading_that_main_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"conversation": [{"human": "问" * 200, "assistant": "答" * 200}]}) + "\n")
    flags = ["--train_args_file", str(CONFIG), "--model_name_or_path", "baichuan2-7b", "--train_file", str(rows)]
    arguments = parse_arguments([*flags, "--output_dir", str(tmp_path / "output")])
    chosen = {}
    for free in (2**30, 2**40):
        monkeypatch.setattr("llm_code.choose_stage.find_cards", lambda: (named_gpu("RTX-3090"), 2))
        monkeypatch.setattr("llm_code.choose_stage.free_host_memory", lambda free=free: free)
        if free == 2**30:
            with pytest.raises(UserError, match=r"only offloading fits, with \d+ GiB of main memory, 1 are free"):
                choose_stage(arguments, 2)
        chosen[free] = choose_stage(arguments, 8 if free == 2**30 else 2)
    assert chosen[2**30][0] == "3" and "3-offload needs 112 GiB of main memory" in chosen[2**30][1]
    assert chosen[2**40][0] in ("2-offload", "3-offload")
    # Of the other machines nothing is known.
    monkeypatch.setattr("llm_code.choose_stage.free_host_memory", lambda: 2**30)
    assert choose_stage(arguments, 2, has_several_machines=True)[0] in ("2-offload", "3-offload")


def test_auto_without_a_card_and_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_code.choose_stage.find_cards", lambda: (None, 0))
    arguments = parse_arguments(["--output_dir", str(tmp_path)])
    assert choose_stage(arguments, 1)[0] == "none" and choose_stage(arguments, 2)[0] == "1"
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / saving.MARKER).write_text('{"stage": "2-offload"}')
    assert choose_stage(arguments, 2) == ("2-offload", f"{tmp_path / 'checkpoint-3'} was written with it")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("baichuan-env", "python3 scripts/environment.py llm_env"),
        ("baichuan-download", "--model_id baichuan-inc/Baichuan2-7B-Chat --revision v1.0.2 --source modelscope"),
        (
            "baichuan-data",
            "--test_file llm_code/data/psychology_test.jsonl --train_args_file llm_code/training_config/baichuan2",
        ),
        (
            "baichuan-plan",
            "finetune.plan --method full --train_args_file llm_code/training_config/baichuan2_config.json",
        ),
        ("baichuan-plan", "--output_dir /o --num_gpus 2"),  # the cards of BAICHUAN_GPUS, as in training
        ("baichuan-plan BAICHUAN_GPUS=1,3,4", "--output_dir /o --num_gpus 3"),
        ("baichuan-plan GPUS=8", "--output_dir /o --num_gpus 8"),
        ("baichuan-finalize", "python -m llm_code.finalize --model_name_or_path /m --output_dir /o"),
    ],
)
def test_a_dry_run_of_every_step_prints_its_command(target: str, words: str) -> None:
    values = ["ENVS_DIR=/e", "BASE_MODEL_DIR=/b", "BAICHUAN_MODEL_DIR=/m", "BAICHUAN_OUTPUT_DIR=/o", "DRY_RUN=1"]
    done = subprocess.run(["make", *target.split(), *values], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"-----> {target.split()[0]}: ") and words in done.stdout


def test_a_plan_counts_the_cards_of_the_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two machines, slots=99 each\nworker-1 slots=8\n\nworker-2  slots=4\n")
    values = [f"HOSTFILE={tmp_path / 'hosts'}", "ENVS_DIR=/e", "BAICHUAN_OUTPUT_DIR=/o", "DRY_RUN=1"]
    done = subprocess.run(["make", "baichuan-plan", *values], cwd=REPOSITORY, capture_output=True, text=True)
    assert "--output_dir /o --num_gpus 12" in done.stdout


def refusal(output_dir: Path, model_dir: Path, *flags: str) -> str:
    """What the training says about going on in a folder whose checkpoint was written by two ranks with stage 1."""
    from finetune.full import full_method
    from finetune.prepare import run_identity
    from finetune.training import run_training

    rows = REPOSITORY / "llm_code" / "data" / "psychology_test.jsonl"
    paths = f"--train_args_file {CONFIG} --model_name_or_path {model_dir} --train_file {rows} --output_dir {output_dir}"
    there = parse_arguments([*paths.split(), "--gradient_accumulation_steps", "2"])
    checkpoint = output_dir / "checkpoint-3"
    checkpoint.mkdir(exist_ok=True)
    marker = {"identity": run_identity(there, 2)[0], "stage": "1", "ranks": 2}
    (checkpoint / saving.MARKER).write_text(json.dumps(marker))
    now = parse_arguments([*paths.split(), *flags])
    with pytest.raises(UserError) as error:
        run_training(now, full_method(now))
    return str(error.value)


def test_another_stage_or_other_rows_of_an_update_are_refused(tmp_path: Path, tiny_baichuan: Path) -> None:
    one_card = refusal(tmp_path, tiny_baichuan, "--deepspeed", str(FILES["1"]), "--gradient_accumulation_steps", "2")
    assert "rows per update: 48 there, 24 now" in one_card
    stage = refusal(tmp_path, tiny_baichuan, "--deepspeed", str(FILES["2"]), "--gradient_accumulation_steps", "4")
    assert "was written with DEEPSPEED_STAGE=1, now it is 2" in stage


# ---- several machines ----


@pytest.mark.parametrize("text", ["worker-1\n", "a slots=2\na slots=2\n", "a slots=0\n", "a slots=2 b\n", "\n"])
def test_a_bad_hostfile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match="slots="):
        read_hostfile(path)


def test_the_other_machines_get_what_ranks_need_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    flags = Namespace(hostfile=tmp_path / "hosts", master_port=7000, command=["--module", "llm_code.train", "a b"])
    command = remote_command(1, "worker-1", flags)
    words = shlex.split(command.partition(" && ")[2])
    assert words[:2] == ["exec", "env"] and "NCCL_SOCKET_IFNAME=eth1" in words and "hf_secret" not in command
    assert words[-3:] == flags.command and "--node_rank=1" in words and "--master_addr=worker-1" in words


# ---- the rest ----


def test_the_models_path_defaults_to_final(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_code.common.constants import model_path

    monkeypatch.setattr("scripts.settings.read_env", dict)
    assert model_path() is None
    monkeypatch.setenv("BAICHUAN_OUTPUT_DIR", "/o")
    assert model_path() == "/o/final"
    monkeypatch.setenv("LLM_MODULE_MODEL_PATH", "/m")
    assert model_path() == "/m"


def test_stage_3_without_weights_at_the_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stage 3.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": false}}')
    check_final_weights(file, "steps")
    check_final_weights(None, "no")
    with pytest.raises(UserError, match="put together from a checkpoint, and save_strategy is no"):
        full_method(parse_arguments(["--deepspeed", str(file), "--save_strategy", "no"]))
