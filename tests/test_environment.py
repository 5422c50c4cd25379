"""How environments are made: which manager, which commands in which order, what is refused, when nothing is done."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import environment, package_install
from scripts.nvidia import find_cards
from tests.conftest import REPOSITORY

SMI = 'echo "0, NVIDIA A40, 46068, {driver}"'


def program(folder: Path, name: str, body: str) -> None:
    """A program that notes its call in calls.jsonl beside it and then does `body`."""
    note = f"open({str(folder / 'calls.jsonl')!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')"
    (folder / name).write_text(f"#!{sys.executable}\nimport json, pathlib, subprocess, sys\n{note}\n{body}\n")
    (folder / name).chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


# An environment's python that pretends to install: it notes what it was asked for.
PYTHON = """
def make_environment(folder):
    bin = pathlib.Path(folder) / "bin"
    bin.mkdir(parents=True, exist_ok=True)
    (bin / "python").symlink_to(pathlib.Path(__file__).parent / "env-python")
"""
CONDA = PYTHON + "make_environment(sys.argv[sys.argv.index('--prefix') + 1])"
UV = PYTHON + "if sys.argv[1] == 'venv': make_environment(sys.argv[-1])"


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Path:
    """A folder of pretended programs, alone on PATH, and ENVS_DIR beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "env-python", "")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("ENVS_DIR", str(tmp_path / "envs"))
    for key in ("ENV_MANAGER", "PIP_INDEX_URL", "UV_DEFAULT_INDEX", "TORCH_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    return folder


def pip_and_uv(folder: Path, *, torch_options: list[str]) -> list[list[str]]:
    lock = str(REPOSITORY / "env" / "lock.txt")
    files = [str(REPOSITORY / "env" / f"{kind}_requirements.txt") for kind in ("qwen", "gpu")]
    python = str(folder / "bin" / "python")
    return [
        ["env-python", "-m", "pip", "install", "--constraint", lock, "torch==2.13.0", *torch_options],
        ["uv", "pip", "install", "--compile-bytecode", "--python", python, "--constraint", lock]
        + [word for file in files for word in ("--requirement", file)],
    ]


def installs(folder: Path) -> list[list[str]]:
    """The calls that change something."""
    return [call for call in calls(folder) if call[0] != "env-python" or call[1:4] == ["-m", "pip", "install"]]


def test_conda_comes_first_and_gets_the_environment_file(fakes, tmp_path, capsys):
    program(fakes, "conda", CONDA)
    program(fakes, "uv", UV)
    folder = environment.ensure("qwen_env")
    file = str(REPOSITORY / "env" / "qwen_env.yml")
    made = ["conda", "env", "create", "--prefix", str(folder), "--file", file]
    assert installs(fakes) == [made, *pip_and_uv(folder, torch_options=[])]
    assert folder == tmp_path / "envs" / "qwen_env"
    assert not folder.with_name("qwen_env.unfinished").exists()

    number = len(installs(fakes))
    environment.ensure("qwen_env")
    assert "qwen_env: already done" in capsys.readouterr().err
    assert len(installs(fakes)) == number


def test_mamba_stands_in_for_conda_and_continues_a_folder_of_conda(fakes, tmp_path):
    program(fakes, "mamba", CONDA)
    program(fakes, "uv", UV)
    (tmp_path / "envs" / "qwen_env" / "conda-meta").mkdir(parents=True)
    environment.ensure("qwen_env")
    assert installs(fakes)[0][:3] == ["mamba", "env", "update"]


def test_uv_makes_an_environment_with_pip_and_the_indexes_reach_both_tools(fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("TORCH_INDEX_URL", "http://127.0.0.1:9/whl/cu126")
    note = "import os; pathlib.Path(__file__).with_name('index').write_text(os.environ.get('UV_DEFAULT_INDEX', ''))"
    program(fakes, "uv", f"{UV}\n{note}")
    folder = environment.ensure("qwen_env")
    made = installs(fakes)
    assert made[0][:5] == ["uv", "venv", "--seed", "--allow-existing", "--python"]
    assert made[1:] == pip_and_uv(folder, torch_options=["--extra-index-url", "http://127.0.0.1:9/whl/cu126"])
    assert (fakes / "index").read_text() == "http://127.0.0.1:9/simple"


def test_an_interrupted_installation_continues_and_changed_requirements_are_installed(fakes, tmp_path, monkeypatch):
    program(fakes, "uv", f"{UV}\nif sys.argv[1] == 'pip': sys.exit(1)")
    with pytest.raises(package_install.EnvironmentFailed, match="uv ended with status 1.*PIP_INDEX_URL"):
        environment.ensure("qwen_env")
    assert (tmp_path / "envs" / "qwen_env.unfinished").exists()
    program(fakes, "uv", UV)
    (fakes / "calls.jsonl").unlink()
    folder = environment.ensure("qwen_env")
    assert installs(fakes) == pip_and_uv(folder, torch_options=[])  # the interpreter was there already

    (fakes / "calls.jsonl").unlink()
    monkeypatch.setenv("TORCH_INDEX_URL", "http://127.0.0.1:9/whl/cpu")
    environment.ensure("qwen_env")
    assert len(installs(fakes)) == 2


def test_a_card_with_an_old_driver_is_refused(fakes, capsys, monkeypatch):
    program(fakes, "uv", UV)
    (fakes / "nvidia-smi").write_text(f"#!/bin/sh\n{SMI.format(driver='550.54.15')}\n")
    (fakes / "nvidia-smi").chmod(0o755)
    assert [(card.name, card.memory_mib) for card in find_cards()] == [("NVIDIA A40", 46068)]
    with pytest.raises(package_install.EnvironmentFailed, match="550.54.15 is older than 580.*cu126"):
        environment.ensure("qwen_env")
    environment.check_driver(".venv", find_cards())  # may run on the processor
    assert "Note: the driver 550.54.15" in capsys.readouterr().err
    (fakes / "nvidia-smi").write_text(f"#!/bin/sh\n{SMI.format(driver='580.65')}\n")
    environment.ensure("qwen_env")
    assert "gpu_requirements.txt" in {file.name for file in environment.files_of(".venv", find_cards())}


def test_an_environment_made_without_a_card_is_made_for_one_all_the_same(fakes, monkeypatch):
    """Installing on a box that has no card for the moment; .venv, and one with the processor's torch, stay small."""

    def names(name: str) -> set[str]:
        return {file.name for file in environment.files_of(name, [])}

    assert "gpu_requirements.txt" in names("qwen_env") & names("llm_env")
    assert "gpu_requirements.txt" not in names(".venv") | names("modelscope_env")
    monkeypatch.setenv("TORCH_INDEX_URL", "http://127.0.0.1:9/whl/cpu/")
    assert names("qwen_env") == {"qwen_requirements.txt"}


@pytest.mark.parametrize("text", ["0, NVIDIA A40, [N/A], 550.54.15", "No devices were found", ""])
def test_a_card_that_does_not_answer_is_none(fakes, text):
    (fakes / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\n")
    (fakes / "nvidia-smi").chmod(0o755)
    assert find_cards() == []


def test_without_a_usable_python_the_words_say_what_is_needed(fakes, monkeypatch):
    (fakes / "python3").write_text("#!/bin/sh\necho 3.8\n")
    (fakes / "python3.12").write_text("#!/bin/sh\necho 'python3.12: command not found' >&2; exit 127\n")  # as pyenv's
    for name in ("python3", "python3.12"):
        (fakes / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fakes / "python3"))
    with pytest.raises(package_install.EnvironmentFailed, match=r"needs Python 3\.11 to 3\.13 .*apt-get"):
        environment.ensure("qwen_env")


@pytest.mark.parametrize(
    ("value", "message"), [("pip", "must be auto, conda, uv or venv, got: pip"), ("conda", "not on PATH")]
)
def test_a_manager_that_is_unknown_or_missing_is_refused(fakes, monkeypatch, value, message):
    monkeypatch.setenv("ENV_MANAGER", value)
    with pytest.raises(package_install.EnvironmentFailed, match=message):
        environment.ensure("qwen_env")


def test_venv_makes_a_real_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ENV_MANAGER", "venv")
    package_install.create("x", tmp_path / "x", Path("unused.yml"))
    assert environment.has_pip(tmp_path / "x")
    assert not environment.has_pip(tmp_path)


def test_the_check_after_installing_sees_a_missing_and_a_wrong_package():
    def check(*pins: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", environment.CHECK, *pins], capture_output=True, text=True)

    assert check(f"pytest=={pytest.__version__}").returncode == 0
    assert "pytest should be 0.1, found" in check("pytest==0.1").stderr
    assert "PackageNotFoundError" in check("no-such-package==1").stderr


def test_every_direct_requirement_is_pinned_to_the_version_of_the_lock():
    lock = environment.pins([environment.LOCK])
    lock = {re.sub("[-_.]+", "-", name).lower(): version for name, version in lock.items()}
    for file in (REPOSITORY / "env").glob("*_requirements.txt"):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
        assert lines == [f"{name}=={version}" for name, version in environment.pins([file]).items()][-len(lines) :]
        for name, version in environment.pins([file]).items():
            if file.name != "gpu_requirements.txt":
                assert lock[re.sub("[-_.]+", "-", name).lower()] == version
    assert not any(mark in environment.LOCK.read_text() for mark in ("+cpu", "@", "://"))


def test_an_environment_without_a_place_is_refused(monkeypatch):
    monkeypatch.delenv("ENVS_DIR", raising=False)
    with pytest.raises(package_install.EnvironmentFailed, match="qwen_env needs ENVS_DIR"):
        environment.ensure("qwen_env")


def test_a_place_that_cannot_be_written_is_one_line(fakes, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ENVS_DIR", str(tmp_path / "file" / "envs"))
    monkeypatch.setattr(environment.settings, "load", lambda: None)  # it would leave its values to the other tests
    monkeypatch.setattr(environment.sys, "argv", ["environment.py", "qwen_env"])
    assert environment.main() == 2
    told = f"error: {tmp_path}/file/envs: Not a directory. Set ENVS_DIR in .env to a folder you may use\n"
    assert capsys.readouterr().err.endswith(told)
