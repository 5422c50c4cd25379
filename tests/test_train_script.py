"""qwen_qlora/train_qwen_qlora.sh: the command it runs, for the cards there are and the settings in the environment."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "qwen_qlora" / "train_qwen_qlora.sh"


def command_of(folder: Path, num_cards: int, *flags: str, **settings: str) -> list[str]:
    """What a dry run prints, as words, on a machine where nvidia-smi lists so many cards."""
    if not num_cards and shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has cards")
    programs = folder / "bin"
    programs.mkdir()
    if num_cards:
        cards = "\\n".join(f"GPU {i}: NVIDIA A40 (UUID: GPU-{i})" for i in range(num_cards))
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{cards}\\n'\n")
        (programs / "nvidia-smi").chmod(0o755)
    return words_of(programs, *flags, **settings)


def words_of(programs: Path, *flags: str, **settings: str) -> list[str]:
    folder = programs.parent
    kept = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
    environment = {**kept, "PATH": f"{programs}:/usr/bin:/bin", "ENVS_DIR": str(folder), "DRY_RUN": "1", **settings}
    result = subprocess.run(["bash", str(SCRIPT), *flags], env=environment, capture_output=True, text=True, check=True)
    prefix, _, command = result.stdout.strip().partition(": ")
    assert prefix == "-----> qwen-train"
    return shlex.split(command)


@pytest.mark.parametrize(
    ("num_cards", "visible", "processes"), [(0, "0", "1"), (2, "", "2"), (4, "1,3,2", "3"), (1, "", "1"), (4, "0", "1")]
)
def test_one_process_for_each_card(tmp_path: Path, num_cards: int, visible: str, processes: str) -> None:
    command = command_of(tmp_path, num_cards, CUDA_VISIBLE_DEVICES=visible)
    assert command[:6] == ["python", "-m", "finetune.launch", "torchrun", "--standalone", "--nproc_per_node"]
    assert command[6:9] == [processes, "-m", "qwen_qlora.train_qlora"]


@pytest.mark.parametrize("body", ["exit 9", "echo No devices were found", "true"])
def test_an_nvidia_smi_that_lists_no_card_leaves_one_process(tmp_path: Path, body: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    command = words_of(tmp_path / "bin", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="")
    assert command[command.index("--nproc_per_node") + 1] == "1"


def test_settings_become_flags_and_the_persons_flags_come_last(tmp_path: Path) -> None:
    command = command_of(
        tmp_path,
        0,
        "--output_dir",
        "/o p",
        QWEN_TRAIN_CONFIG="c.json",
        QWEN_MODEL_DIR="/m",
        QWEN_TRAIN_FILE="t.jsonl",
        QWEN_OUTPUT_DIR="/o",
    )
    flags = command[command.index("qwen_qlora.train_qlora") + 1 :]
    named = "--train_args_file c.json --model_name_or_path /m --train_file t.jsonl --output_dir /o --output_dir".split()
    assert flags == [*named, "/o p"]
