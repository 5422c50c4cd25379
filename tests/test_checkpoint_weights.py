"""Converted weights compute the same function as the originals."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.checkpoint import weights
from finetune.checkpoint.convert import convert_checkpoint
from tests.reference_baichuan2 import baichuan2_logits
from tests.reference_qwen1 import qwen1_logits, read_state
from tests.tiny.build_baichuan2 import build_baichuan2
from tests.tiny.build_qwen1 import build_qwen1

# A spread far above a trained model's: the logits reach 10 and every mistake shows.
STRONG = {"std": 0.25, "hidden_size": 96, "num_layers": 3, "ff_size": 160, "dtype": "float32"}


def largest_difference(target, expected_TV, ids_T):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = model(ids_T[None]).logits[0]
    assert expected_TV.std() > 0.3
    return (logits_TV - expected_TV).abs().max().item()


@pytest.mark.parametrize(("weight_format", "num_shards"), [("safetensors", 4), ("bin", 2), ("safetensors", 1)])
def test_qwen1_logits(tmp_path, weight_format, num_shards):
    source = build_qwen1(tmp_path / "in", 1, weight_format=weight_format, num_shards=num_shards, **STRONG)
    target = convert_checkpoint(source, tmp_path / "out")
    ids_T = torch.randint(0, 2048, (80,), generator=torch.Generator().manual_seed(2))
    assert largest_difference(target, qwen1_logits(source, ids_T), ids_T) < 2e-4


@pytest.mark.parametrize("num_shards", [1, 3])
def test_baichuan2_logits(tmp_path, num_shards):
    source = build_baichuan2(tmp_path / "in", 1, num_shards=num_shards, **STRONG)
    target = convert_checkpoint(source, tmp_path / "out")
    ids_T = torch.randint(0, 800, (80,), generator=torch.Generator().manual_seed(2))
    assert largest_difference(target, baichuan2_logits(source, ids_T), ids_T) < 2e-4


def test_dtype_is_kept_and_nothing_is_rounded(tiny_qwen_original, tiny_qwen):
    source, target = read_state(tiny_qwen_original, torch.bfloat16), read_state(tiny_qwen, torch.bfloat16)
    fused = torch.cat([target[f"model.layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv"])
    assert torch.equal(fused, source["transformer.h.1.attn.c_attn.weight"])
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == sum(tensor.numel() for tensor in source.values())


def test_head_rows_have_norm_one_in_bfloat16(tiny_baichuan_original, tiny_baichuan):
    head_VH = read_state(tiny_baichuan)["lm_head.weight"]
    original_VH = read_state(tiny_baichuan_original)["lm_head.weight"]
    assert (original_VH.norm(dim=-1) - 1).abs().min() > 0.1
    assert (head_VH.norm(dim=-1) - 1).abs().max() < 3e-3
    cosine_V = torch.cosine_similarity(head_VH, original_VH)
    assert cosine_V.min() > 0.9999


def test_large_files_are_cut(tmp_path, tiny_qwen_original, monkeypatch):
    monkeypatch.setattr("finetune.checkpoint.manifest.MAX_SHARD_BYTES", 100_000)
    target = convert_checkpoint(tiny_qwen_original, tmp_path / "out")
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    AutoModelForCausalLM.from_pretrained(target)


def test_a_source_file_stays_until_all_of_it_is_converted(tmp_path, tiny_qwen_original, tiny_qwen, monkeypatch):
    """Several new files of one old one, the original removed on the way."""
    monkeypatch.setattr("finetune.checkpoint.manifest.MAX_SHARD_BYTES", 100_000)
    source = Path(shutil.copytree(tiny_qwen_original, tmp_path / "source"))
    target = convert_checkpoint(source, tmp_path / "out", keep_original=False)
    found, expected = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (target, tiny_qwen))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(list(target.glob("*.safetensors"))) > 3 and not list(source.glob("*.safetensors"))


def test_rows_are_normalized_in_every_block(monkeypatch):
    monkeypatch.setattr(weights, "ROWS_AT_ONCE", 4)
    rows = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.normalized(rows), rows / rows.square().sum(1, keepdim=True).sqrt())
