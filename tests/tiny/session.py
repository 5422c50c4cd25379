"""Tiny checkpoints built once a test session, also when pytest-xdist runs several processes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def build_once(tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Folder `name` shared by the session's processes; the first one to ask builds it, the others wait."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "tiny" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".built").exists():
            build(folder)
            folder.with_suffix(".built").touch()
    return folder


@pytest.fixture(scope="session")
def tiny_qwen_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in the original Qwen-1 layout; read it, don't change it."""
    from tests.tiny.build_qwen1 import build_qwen1

    return build_once(tmp_path_factory, "qwen_original", build_qwen1)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory, tiny_qwen_original: Path) -> Path:
    """The same checkpoint converted to Qwen2ForCausalLM."""
    return build_once(tmp_path_factory, "qwen", lambda folder: convert(tiny_qwen_original, folder))


@pytest.fixture(scope="session")
def tiny_baichuan_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in the original Baichuan2-7B layout; read it, don't change it."""
    from tests.tiny.build_baichuan2 import build_baichuan2

    return build_once(tmp_path_factory, "baichuan_original", build_baichuan2)


@pytest.fixture(scope="session")
def tiny_baichuan(tmp_path_factory: pytest.TempPathFactory, tiny_baichuan_original: Path) -> Path:
    """The same checkpoint converted to LlamaForCausalLM."""
    return build_once(tmp_path_factory, "baichuan", lambda folder: convert(tiny_baichuan_original, folder))


def convert(source: Path, target: Path) -> None:
    from finetune.checkpoint.convert import convert_checkpoint

    convert_checkpoint(source, target)
