"""The surroundings every test runs in: one thread per process, no hub, no setting of the person who runs them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.nvidia import find_cards
from scripts.settings import read_example
from tests.tiny.session import tiny_baichuan, tiny_baichuan_original, tiny_qwen, tiny_qwen_original  # noqa: F401
from tests.web_fixtures import browser, pictures, served, service, visitor  # noqa: F401

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = {"capture_output": True, "text": True}
NOT_COPIED = {".git", ".venv", ".env", ".cache", "logs", "outputs", "__pycache__", ".pytest_cache", ".ruff_cache"}

# Without PASSIVE, libgomp's spinning threads of parallel tests take the cores from each other.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    if find_cards():  # which torch does not see: the tests mean the processor
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:  # of nohup or a shell's `&`: what tests start would inherit it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
for key in [*read_example(), "BG", "DRY_RUN", "STEP", "MAKEFLAGS", "MAKELEVEL"]:
    if key != "CUDA_VISIBLE_DEVICES":
        os.environ.pop(key, None)


@pytest.fixture(scope="session")
def deepspeed_kernels() -> dict[str, str]:
    """DeepSpeed's CPU kernels, built; scripts/test.sh has begun that in the background.

    The value is an environment that finds the same ninja, as steps have it: another version would build them again.
    """
    subprocess.run(["bash", "scripts/prebuild_deepspeed.sh", sys.executable], cwd=REPOSITORY, check=True)
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository without `.env`, in which a test may write its own and run make."""
    target = tmp_path / "checkout"
    shutil.copytree(REPOSITORY, target, ignore=lambda _, names: NOT_COPIED.intersection(names))
    return target


@pytest.fixture
def make(checkout: Path):
    """Run make in the checkout, e.g. make("config", "SOURCE=x", environment={...}); returns the completed process."""

    def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        variables = {**os.environ, **(environment or {})}
        return subprocess.run(["make", *arguments], cwd=checkout, env=variables, stdin=subprocess.DEVNULL, **OUTPUT)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: begun last, it would run alone on one core while the other is idle."""
    items.sort(key=lambda item: item.path.name != "test_llm_train.py")
