"""Loading, generation and scores on a GPU: the same answers as one by one, and a real out-of-memory."""

import random

import pytest
import torch

from finetune.generate import OutOfMemoryGuard, Sampling, generate_batch, generate_texts
from finetune.label_scores import label_log_likelihoods
from finetune.models import default_dtype, load_for_inference
from finetune.stream import stream_text
from tests.adapters import make_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def adapter(tiny_qwen, tmp_path_factory):
    return make_adapter(tiny_qwen, tmp_path_factory.mktemp("gpu") / "adapter", spread=0.2)


@pytest.fixture(scope="module")
def loaded(tiny_qwen, adapter):
    return load_for_inference(tiny_qwen, adapter, dtype="float32")


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(7)
    return [[rng.randrange(2000) for _ in range(rng.randint(3, 40))] for _ in range(16)]


def test_the_default_is_16_bit_on_the_card(tiny_qwen, adapter):
    model, _ = load_for_inference(tiny_qwen, adapter)
    assert default_dtype() in ("bfloat16", "float16")
    assert model.dtype == getattr(torch, default_dtype())
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_four_bits_on_the_card(tiny_qwen, adapter, prompts):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = load_for_inference(tiny_qwen, adapter, load_in_4bit=True)
    assert len(dict(generate_texts(model, tokenizer, prompts, 8))) == 16


def test_batches_streams_and_single_rows_agree(loaded, prompts):
    together = dict(generate_texts(*loaded, prompts, 12))
    assert together == dict(generate_texts(*loaded, prompts, 12, max_rows=1))
    assert len(set(together.values())) > 8
    for index, prompt in enumerate(prompts):
        assert "".join(stream_text(*loaded, prompt, 12)) == together[index].rstrip("\ufffd")
    sampled = [list(stream_text(*loaded, prompts[0], 12, Sampling(1.0, 0.9, 50), seed=s)) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_label_scores_equal_the_cpu(loaded, prompts):
    candidates = [["相同", "不相同", "是"]] * 16
    found = label_log_likelihoods(*loaded, prompts, candidates)
    model, tokenizer = loaded
    try:
        expected = label_log_likelihoods(model.cpu(), tokenizer, prompts, candidates)
    finally:
        model.cuda()
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_a_full_card_halves_the_batch(loaded):
    rng = random.Random(1)
    long_prompts = [[rng.randrange(2000) for _ in range(1500)] for _ in range(128)]

    def answer(part):
        return generate_batch(*loaded, part, 2)

    free = OutOfMemoryGuard()
    expected = free.run(answer, long_prompts)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 200e6) / total)
    try:
        full = OutOfMemoryGuard()
        assert full.run(answer, long_prompts) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free.parts == 1 < full.parts
