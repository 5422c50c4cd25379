"""What `make doctor` prints on machines made up for it: temporary folders, a pretended nvidia-smi, hubs on loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.environment import MARKER
from tests.conftest import REPOSITORY

PLACES = [
    "BASE_MODEL_DIR",
    "QWEN_MODEL_DIR",
    "QWEN_OUTPUT_DIR",
    "QWEN_MERGED_DIR",
    "BAICHUAN_MODEL_DIR",
    "BAICHUAN_OUTPUT_DIR",
    "ENVS_DIR",
]


@pytest.fixture
def doctor(checkout, make, tmp_path, monkeypatch):
    """Run make doctor with these settings in .env on a machine with so many cards; returns its lines and its status."""
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # conftest sets it on some machines, and it beats .env

    def run(cards: int, *arguments: str, **settings: str) -> tuple[list[str], int]:
        listed = "".join(f"{i}, NVIDIA A100-SXM4-80GB, 81920, 580.65.06\\n" for i in range(cards))
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\nprintf '{listed}'\n" if cards else "#!/bin/sh\nexit 9\n")
        smi.chmod(0o755)
        (checkout / ".env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        done = make("doctor", *arguments, environment={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
        return done.stdout.splitlines(), done.returncode

    return run


def lines_of(lines: list[str], subject: str) -> list[str]:
    return [line for line in lines if line.split()[1] == subject]


# ---- disks ----


def finish(envs: Path, *names: str) -> None:
    for name in names:
        (envs / name).mkdir(parents=True)
        (envs / name / MARKER).touch()


def disk_lines(doctor, folder: Path, **settings: str) -> tuple[str, str]:
    """The lines of project 1 and project 2 where all places are on one disk."""
    lines, _ = doctor(0, **{key: str(folder / key) for key in PLACES}, **settings)
    of_qwen, of_baichuan = lines_of(lines, "disk")
    return of_qwen, of_baichuan


def test_each_missing_environment_is_counted_and_no_finished_one(doctor, tmp_path):
    """91.9 GB of project 1 and 285.2 GB of project 2, and 6.0 GB for each environment that is not there."""
    of_qwen, of_baichuan = disk_lines(doctor, tmp_path)
    assert "takes 104 GB more" in of_qwen and "ENVS_DIR" in of_qwen
    assert "takes 297 GB more" in of_baichuan and "ENVS_DIR" in of_baichuan
    finish(tmp_path / "ENVS_DIR", "modelscope_env", "llm_env")
    of_qwen, of_baichuan = disk_lines(doctor, tmp_path)
    assert "takes 98 GB more" in of_qwen and "takes 285 GB more" in of_baichuan
    of_qwen, _ = disk_lines(doctor, tmp_path, TORCH_INDEX_URL="http://127.0.0.1:9/whl/cpu")
    assert "takes 94 GB more" in of_qwen  # 91.9 and 2.2


def test_a_removed_original_and_a_converted_model_are_not_counted(doctor, tmp_path):
    finish(tmp_path / "ENVS_DIR", "modelscope_env", "qwen_env", "llm_env")
    of_qwen, of_baichuan = disk_lines(doctor, tmp_path, KEEP_ORIGINAL="0")
    assert "takes 64 GB more" in of_qwen and "KEEP_ORIGINAL" not in of_qwen + of_baichuan
    assert "takes 270 GB more" in of_baichuan  # 15.0 and 255.2
    for key in ("QWEN_MODEL_DIR", "BAICHUAN_MODEL_DIR"):
        (tmp_path / key).mkdir()
        (tmp_path / key / "model-00001-of-00004.safetensors").touch()
    for keep in ("0", "1"):
        of_qwen, of_baichuan = disk_lines(doctor, tmp_path, KEEP_ORIGINAL=keep)
        assert "takes 35 GB more" in of_qwen and "takes 255 GB more" in of_baichuan


# ---- cards ----


UNUSED = "CUDA_VISIBLE_DEVICES=0 leaves 1 of 2 cards unused by qwen-train: to use all of them, leave it empty in .env"
ABSENT = "this machine has card 0: set"


@pytest.mark.parametrize(
    ("cards", "settings", "level", "words"),
    [
        (2, {"CUDA_VISIBLE_DEVICES": "0"}, "warn", f"{UNUSED} (CUDA_VISIBLE_DEVICES=)"),
        (
            2,
            {"CUDA_VISIBLE_DEVICES": "-1"},
            "warn",
            f"{UNUSED} (CUDA_VISIBLE_DEVICES=)".replace("=0 leaves 1", "=-1 leaves 2"),
        ),
        (1, {"BAICHUAN_GPUS": "0,1"}, "warn", f"BAICHUAN_GPUS=0,1 names card 1, {ABSENT} BAICHUAN_GPUS=0"),
        (
            2,
            {"CUDA_VISIBLE_DEVICES": "", "BAICHUAN_GPUS": "2,3"},
            "warn",
            "BAICHUAN_GPUS=2,3 names cards 2, 3, this machine has cards 0, 1: set BAICHUAN_GPUS=0,1",
        ),
        (
            1,
            {"CUDA_VISIBLE_DEVICES": "0,1", "BAICHUAN_GPUS": "0"},
            "FAIL",
            f"CUDA_VISIBLE_DEVICES=0,1 names card 1, {ABSENT} CUDA_VISIBLE_DEVICES=0",
        ),
    ],
)
def test_cards_chosen_by_number_are_compared_with_those_found(doctor, cards, settings, level, words):
    lines, status = doctor(cards, **settings)
    found = [line for line in lines_of(lines, "card") if not line.startswith("ok")]
    assert found == [f"{level:<5} {'card':<15} {words}"]
    assert status or level == "warn"


@pytest.mark.parametrize(
    ("cards", "settings"),
    [
        (2, {"CUDA_VISIBLE_DEVICES": "", "BAICHUAN_GPUS": "0,1"}),
        (2, {"CUDA_VISIBLE_DEVICES": "1,0"}),
        (1, {"BAICHUAN_GPUS": "0,1", "HOSTFILE": "hosts"}),
        (1, {"CUDA_VISIBLE_DEVICES": "GPU-8f2c", "BAICHUAN_GPUS": "0"}),
    ],
)
def test_cards_that_are_all_there_and_used_are_not_talked_about(doctor, cards, settings):
    lines, _ = doctor(cards, **settings)
    assert len(lines_of(lines, "card")) == cards
    assert all(line.startswith("ok") for line in lines_of(lines, "card"))


def test_without_a_card_none_is_missed(doctor):
    lines, _ = doctor(0, CUDA_VISIBLE_DEVICES="0,1", BAICHUAN_GPUS="0,1")
    (line,) = lines_of(lines, "card")
    assert "CUDA_VISIBLE_DEVICES" not in line and "BAICHUAN_GPUS" not in line


# ---- hubs ----


@pytest.fixture
def hub():
    """An address where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_the_hub_of_mmcu_is_asked_too_and_only_warned_about(doctor, hub):
    away = f"127.0.0.1:{closed_port()}"
    lines, _ = doctor(0, "NET=1", MODELSCOPE_ENDPOINT=hub, HF_ENDPOINT=f"http://{away}")
    of_models, of_mmcu = lines_of(lines, "net")
    assert of_models.split()[0] == "ok" and of_mmcu.startswith("warn ") and f"{away} does not answer" in of_mmcu
    assert "HF_ENDPOINT" in of_mmcu and "MMCU_SOURCE" in of_mmcu and "mmcu-download" in of_mmcu

    lines, _ = doctor(
        0, "NET=1", SOURCE="huggingface", MMCU_SOURCE="modelscope", HF_ENDPOINT=hub, MODELSCOPE_ENDPOINT=hub
    )
    assert len(lines_of(lines, "net")) == 1  # the same hub, asked once
    lines, _ = doctor(0, "NET=1", MMCU_SOURCE="modelscope", MODELSCOPE_ENDPOINT=f"http://{away}", HF_ENDPOINT=hub)
    (line,) = lines_of(lines, "net")
    assert line.startswith("FAIL") and "SOURCE, MODELSCOPE_ENDPOINT in .env" in line


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "scripts/doctor.py"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
