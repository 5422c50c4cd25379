"""What the doctor finds, on machines made up for it."""

import http.server
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import doctor, environment
from scripts.nvidia import Card


def level_and_text(findings: list, subject: str) -> tuple[str, str]:
    return next((level, text) for level, name, text in findings if name == subject)


@pytest.mark.parametrize(
    ("memory_mib", "driver", "card_level", "driver_fails"),
    [(46068, "580.65.06", "ok", False), (24564, "580.65.06", "warn", False), (46068, "550.54", "ok", True)],
)
def test_cards(monkeypatch, memory_mib, driver, card_level, driver_fails):
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    monkeypatch.setattr(doctor, "find_cards", lambda: [Card(0, "NVIDIA A40", memory_mib, driver)])
    monkeypatch.setattr(doctor, "cuda_version", lambda: "12.4")
    findings = doctor.check_cards()
    assert level_and_text(findings, "card")[0] == card_level
    assert f"driver {driver}" in level_and_text(findings, "card")[1]
    assert any(level == "FAIL" and "cu126" in text for level, _, text in findings) == driver_fails


def test_memory_is_the_container_s_where_that_is_less(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       80000000 kB\nMemFree:        1 kB\n")
    assert doctor.check_memory(meminfo, limit) == [("ok", "memory", "82 GB")]
    limit.write_text("max\n")
    assert doctor.check_memory(meminfo, limit)[0][0] == "ok"
    limit.write_text("4000000000\n")
    level, _, text = doctor.check_memory(meminfo, limit)[0]
    assert (level, text[:5]) == ("warn", "4 GB;")


QWEN_PLACES = ["BASE_MODEL_DIR", "QWEN_MODEL_DIR", "QWEN_OUTPUT_DIR", "QWEN_MERGED_DIR"]


@pytest.fixture
def places(tmp_path, monkeypatch):
    for key in QWEN_PLACES:
        monkeypatch.setenv(key, str(tmp_path / key / "deeper"))
    monkeypatch.setenv("QWEN_MODEL_ID", "qwen/Qwen-14B-Chat")
    return tmp_path


@pytest.mark.parametrize(("free", "level"), [(92.0e9, "ok"), (91.8e9, "FAIL")])
def test_disk_is_compared_with_three_copies_of_the_model_and_two_checkpoints(places, monkeypatch, free, level):
    """3 x 28.3 GB + 7.0 GB (2 x 3.0 GB and final/) = 91.9 GB."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    found = of_project_1()
    assert len(found) == 1 and found[0][0] == level
    assert ("KEEP_ORIGINAL=0 takes 28 GB less" in found[0][2]) == (level == "FAIL")


def of_project_1() -> list:
    return [finding for finding in doctor.check_disks() if "project 2" not in finding[2]]


@pytest.mark.parametrize(("free", "level"), [(63.7e9, "ok"), (63.5e9, "FAIL")])
def test_an_original_that_is_removed_is_not_counted_and_its_removal_not_advised(places, monkeypatch, free, level):
    """28.3 GB converted, 28.3 GB merged, 7.0 GB of training; the file in conversion is gone before the training."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    monkeypatch.setenv("KEEP_ORIGINAL", "0")
    ((found, _, text),) = of_project_1()
    assert found == level and "takes 64 GB more" in text and "KEEP_ORIGINAL" not in text


def test_the_model_and_one_file_are_held_at_once_where_only_they_are_written(places, monkeypatch):
    """28.3 GB and 2.1 GB; of what a cut conversion has moved, nothing is asked for again."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e9))
    monkeypatch.setenv("KEEP_ORIGINAL", "0")
    for key in ("QWEN_OUTPUT_DIR", "QWEN_MERGED_DIR"):
        monkeypatch.delenv(key)
    assert "takes 30 GB more" in of_project_1()[0][2]
    put(places / "QWEN_MODEL_DIR" / "deeper.partial" / "model-00001-of-00008.safetensors", 10e9)
    put(places / "BASE_MODEL_DIR" / "deeper" / "qwen" / "Qwen-14B-Chat" / "model-00015-of-00015.safetensors", 18e9)
    assert "takes 2 GB more" in of_project_1()[0][2]


def test_an_original_on_a_disk_of_its_own_is_counted_there(places, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e9))
    monkeypatch.setenv("KEEP_ORIGINAL", "0")
    monkeypatch.setenv("BASE_MODEL_DIR", "/dev/shm/doctor")
    if os.stat("/dev/shm").st_dev == places.stat().st_dev:
        pytest.skip("this machine has one disk")
    texts = [text for _, _, text in of_project_1()]
    assert len(texts) == 2 and all("KEEP_ORIGINAL" not in text for text in texts)
    assert "takes 28 GB more (BASE_MODEL_DIR)" in texts[0] and "takes 64 GB more (QWEN_MODEL_DIR, " in texts[1]


def put(file: Path, size: float) -> None:
    """A file of that size that takes no room: a hole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as opened:
        opened.truncate(int(size))


def test_what_is_on_the_disk_already_is_not_asked_for_again(places, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=63.2e9))
    weights = places / "QWEN_MODEL_DIR" / "deeper" / "model-00001-of-00002.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert "takes 35 GB more" in doctor.check_disks()[0][2]  # 28.3 + 7.0: nothing is downloaded again


def test_of_the_original_the_bytes_of_this_model_are_subtracted_and_no_others(places, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=100e9))
    folder = places / "BASE_MODEL_DIR" / "deeper"
    for name, size in (("baichuan-inc/Baichuan2-7B-Chat", 15e9), ("qwen/Qwen-14B-Chat", 8.3e9)):
        put(folder / name / "model.safetensors", size)
    assert "takes 84 GB more" in doctor.check_disks()[0][2]  # 91.9 - 8.3


def test_a_place_nobody_may_look_into_is_a_finding(places, monkeypatch, capsys):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor, "_existing_parent", forbidden)
    monkeypatch.setattr(doctor.settings, "load", lambda: None)  # it would leave its values to the other tests
    monkeypatch.setattr(doctor.sys, "argv", ["doctor.py"])
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    told = f"{places}/BASE_MODEL_DIR/deeper: Permission denied. Set BASE_MODEL_DIR in .env to a folder you may use"
    assert f"FAIL  disks           {told}" in lines
    assert any(" memory " in line for line in lines) and any(" python " in line for line in lines)


@pytest.mark.parametrize(("there", "words"), [(True, "lists no card: run it to see why"), (False, "is not on PATH")])
def test_a_missing_and_a_silent_nvidia_smi_are_told_apart(tmp_path, monkeypatch, there, words):
    if there:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    ((level, _, text),) = doctor.check_cards()
    assert level == "warn" and f"nvidia-smi {words}" in text


@pytest.mark.parametrize(("free", "level"), [(286e9, "ok"), (285e9, "warn")])
def test_disk_for_project_2_is_a_line_of_its_own(tmp_path, monkeypatch, free, level):
    """2 x 15 GB of weights, 2 checkpoints of 120.1 GB, final/ of 15 GB; too little only warns."""
    for key in ("BASE_MODEL_DIR", "BAICHUAN_MODEL_DIR", "BAICHUAN_OUTPUT_DIR"):
        monkeypatch.setenv(key, str(tmp_path / key))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    found, subject, text = doctor.check_disks()[-1]
    assert (found, subject) == (level, "disk") and "project 2, Baichuan2-7B-Chat, takes 285 GB more" in text
    assert text.endswith("DEEPSPEED_STAGE=none takes 150 GB less") == (level == "warn")
    # 6 bytes a parameter in a checkpoint instead of 16
    monkeypatch.setenv("DEEPSPEED_STAGE", "none")
    found, _, text = doctor.check_disks()[-1]
    assert found == "ok" and "takes 135 GB more" in text and "none takes" not in text


def test_the_hub_is_asked_only_when_asked_to(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SOURCE", "huggingface")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert doctor.check_net() == [("ok", "net", f"127.0.0.1:{server.server_port} answers")]
    server.shutdown()
    server.server_close()
    level, _, text = doctor.check_net()[0]
    assert level == "FAIL" and "HF_ENDPOINT in .env" in text


def test_make_doctor_looks_at_this_machine_and_names_the_environment_to_make(checkout, make, tmp_path, monkeypatch):
    (checkout / ".env").write_text(f"ENVS_DIR={tmp_path}\nENV_MANAGER=venv\n")
    (tmp_path / "qwen_env").mkdir()
    monkeypatch.setenv("TORCH_INDEX_URL", "")
    files = environment.files_of("qwen_env", [])
    (tmp_path / "qwen_env" / environment.MARKER).write_text(environment.fingerprint_of(files))
    (tmp_path / "llm_env").mkdir()
    (tmp_path / "llm_env" / environment.MARKER).write_text("of an older repository, or without a card")
    done = make("doctor")
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert lines["settings"].startswith("ok")
    assert lines["qwen_env"] == f"ok    qwen_env        {tmp_path}/qwen_env"
    assert lines["modelscope_env"] == "warn  modelscope_env  not there yet: make modelscope-env"
    other = f"{tmp_path}/llm_env has other packages than wanted here now: make baichuan-env"
    assert lines["llm_env"] == f"warn  llm_env         {other}"
    assert lines["memory"].endswith("GB") or "GB;" in lines["memory"]
    assert "net" not in lines


def test_a_model_in_use_that_is_not_the_trained_one_is_asked_about(monkeypatch):
    for key, value in (
        ("QWEN_OUTPUT_DIR", "/o/q"),
        ("QWEN_ADAPTER_DIR", "/o/q/final/"),
        ("BAICHUAN_OUTPUT_DIR", "/o/new"),
    ):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("LLM_MODULE_MODEL_PATH", "/o/old/final")
    ((level, subject, text),) = doctor.check_pairs()
    assert (level, subject) == ("warn", "settings")
    assert "LLM_MODULE_MODEL_PATH is /o/old/final, while the training writes /o/new/final" in text
    monkeypatch.setenv("LLM_MODULE_MODEL_PATH", "/o/new/final")
    assert doctor.check_pairs() == []


def test_wheels_for_the_processor_are_told_where_there_is_a_card(monkeypatch):
    monkeypatch.setattr(doctor, "find_cards", lambda: [Card(0, "NVIDIA A40", 46068, "580.65.06")])
    monkeypatch.setattr(doctor, "cuda_version", lambda: "13.0")
    monkeypatch.setenv("TORCH_INDEX_URL", "http://127.0.0.1:9/whl/cu126")
    assert "torch" not in [subject for _, subject, _ in doctor.check_cards()]
    monkeypatch.setenv("TORCH_INDEX_URL", "http://127.0.0.1:9/whl/cpu")
    level, text = level_and_text(doctor.check_cards(), "torch")
    assert level == "FAIL" and "empty it" in text


def test_an_environment_whose_torch_does_not_see_the_card_fails(tmp_path, monkeypatch):
    cards = [Card(0, "NVIDIA A40", 46068, "550.54")]
    folder = tmp_path / "qwen_env"
    (folder / "bin").mkdir(parents=True)
    (folder / doctor.MARKER).touch()
    monkeypatch.setenv("ENVS_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "is_current", lambda *_: True)
    python = folder / "bin" / "python"
    for answer, level in (("False 2.13.0+cu130", "FAIL"), ("True 2.13.0+cu126", "ok"), ("", "ok")):
        python.write_text(f"#!/bin/sh\necho {answer}\n")
        python.chmod(0o755)
        found, _, text = doctor._check_environment("qwen_env", cards)
        assert found == level and ("torch 2.13.0+cu130" in text) == (level == "FAIL")
        assert doctor._check_environment("qwen_env", [])[0] == "ok"
