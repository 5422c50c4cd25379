"""The kernels' self-check runs on a CPU, passes, and fails when a kernel is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check_cuda

REPOSITORY = Path(__file__).parents[1]


def test_passes_here(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_cuda", "--device", "cpu"])
    assert check_cuda.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and lines[-1] == "0 bounds exceeded"


def test_a_wrong_kernel_exceeds_its_bound(monkeypatch, capsys):
    x = torch.randn(4, 4)
    wrong = [
        ("slightly off", lambda x: x * 1.02, lambda x: x, [x]),
        ("not a number", lambda x: x * torch.nan, lambda x: x, [x]),
    ]
    monkeypatch.setattr(check_cuda, "cases", lambda device, sizes: iter(wrong))
    monkeypatch.setattr(sys, "argv", ["check_cuda", "--device", "cpu"])
    assert check_cuda.main() == 1
    assert capsys.readouterr().out.count("EXCEEDED") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_passes_on_the_gpu():
    """In a process of its own: Liger's rotary positions stay in transformers, for models on the CPU too."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.check_cuda", "--device", "cuda"], cwd=REPOSITORY)
    assert done.returncode == 0
