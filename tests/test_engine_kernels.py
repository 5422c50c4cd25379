"""The GPU's operations against the plain ones: Triton's kernels in its interpreter, everything on a real GPU."""

import os
import subprocess
import sys

import pytest
import torch

from llm_code.module_interface import gpu_operations
from llm_code.module_interface.decoder import Decoder
from llm_code.module_interface.operations import Operations
from tests.conftest import REPOSITORY
from tests.engines import CONTEXT, answer, engine, greedy, model, prompts, token_ids

INTERPRETED = """
import sys, torch
from llm_code.module_interface import kernels
from llm_code.module_interface.decoder import Decoder
from llm_code.module_interface.gpu_operations import Trials
from llm_code.module_interface.operations import Operations
from tests.engines import CONTEXT, model
for family, heads in (("llama", 2), ("qwen3", 2), ("llama", 4)):
    for dtype in (torch.float32, torch.float16):
        trials = Trials(Decoder(model(family, num_key_value_heads=heads).to(dtype), CONTEXT))
        for name in ("add_norm", "gate", "rotate_and_store", "attend_decode"):
            if problem := trials.problem(name, getattr(kernels, name), getattr(Operations(), name)):
                sys.exit(f"{family} {heads} {dtype} {name}: {problem}")
"""
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_triton_kernels_in_the_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if "only 0-dimensional arrays can be converted" in ran.stdout + ran.stderr:
        pytest.skip("this Triton's interpreter does not run on this numpy")
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_wrong_kernel_is_left_out():
    trials = gpu_operations.Trials(Decoder(model(), CONTEXT))

    def wrong(q_BHD, keys_values, starts_B, lengths_B, places, scaling):
        return Operations().attend_decode(q_BHD, keys_values, starts_B, lengths_B, places, scaling * 1.1)

    def broken(*inputs):
        raise RuntimeError("no such architecture")

    plain = Operations().attend_decode
    assert "differs by" in trials.problem("attend_decode", wrong, plain)
    assert "no such architecture" in trials.problem("attend_decode", broken, plain)
    assert trials.problem("attend_decode", plain, plain) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_is_no_candidate_where_it_knows_no_such_dtype(dtype, monkeypatch, caplog):
    """So that a warning is left for a kernel that fails where it should not."""
    tried = []
    monkeypatch.setattr(gpu_operations.Trials, "problem", lambda self, name, candidate, plain: tried.append(candidate))
    gpu_operations.choose_operations(Decoder(model().to(dtype), CONTEXT))
    assert (gpu_operations.flash_prefill in tried) == (dtype == torch.bfloat16)
    assert gpu_operations.flash_decode in gpu_operations.candidates_for(torch.bfloat16)["attend_decode"]
    assert not [record for record in caplog.records if "is not used" in record.message]


def test_a_failing_kernel_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(gpu_operations.Trials, "problem", lambda *_: "no such architecture")
    assert not gpu_operations.choose_operations(Decoder(model(), CONTEXT)).chosen
    noted = [r.levelname for r in caplog.records if "no such architecture" in r.message]
    candidates = gpu_operations.candidates_for(torch.float32)
    assert noted == ["WARNING"] * sum(map(len, candidates.values()))


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_captured_steps_give_the_answers_of_generate(family):
    lm, asked = model(family).cuda(), prompts(3, 17, 40, 1, 100, 64)
    expected = [answer(model(family), prompt) for prompt in asked]
    running = engine(lm=lm)
    running.submit([1], greedy(2)).result(60)
    runner = running._worker.runner
    assert set(runner.graphs) == {1, 2, 4}
    assert runner.operations.chosen["attend_decode"] == "kernels.attend_decode"
    together = [running.submit(prompt, greedy()) for prompt in asked]
    assert [token_ids(request.result(60)) for request in together] == expected
    assert [token_ids(running.submit(prompt, greedy()).result(60)) for prompt in asked] == expected
    running.close()


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel_is_used_in_16_bit(dtype):
    operations = gpu_operations.choose_operations(Decoder(model("llama").to(dtype).cuda(), CONTEXT))
    names = {"add_norm", "gate", "rotate_and_store", "attend_decode", "attend_prefill"}
    assert set(operations.chosen) == names
    assert operations.chosen["attend_decode"] == "kernels.attend_decode"
