"""final/ of full-parameter training: its head, what make baichuan-finalize refuses, and the check of its weights."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import saving
from finetune.errors import UserError
from finetune.norm_head import fold_head, has_norm_head
from llm_code.finalize import newer_than
from tests.conftest import REPOSITORY


def write_model(folder: Path, norm_head: bool) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "conversion.json").write_text(json.dumps({"norm_head": norm_head}))
    return folder


def test_folding_normalises_the_head_and_nothing_else(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = write_model(tmp_path / "model", True)
    before = load_file(folder / "model.safetensors")
    fold_head(folder)
    after = load_file(folder / "model.safetensors")
    head = before.pop("lm_head.weight").double()
    expected = torch.stack([row / math.sqrt(sum(x * x for x in row.tolist())) for row in head]).to(torch.bfloat16)
    assert torch.equal(after.pop("lm_head.weight"), expected)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_norm_head_is_known_by_either_marker(tmp_path: Path) -> None:
    assert not has_norm_head(tmp_path)
    assert has_norm_head(write_model(tmp_path / "converted", True))
    assert not has_norm_head(write_model(tmp_path / "plain", False))
    (tmp_path / saving.MARKER).write_text('{"norm_head": true}')
    assert has_norm_head(tmp_path)


def finalize(*flags: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llm_code.finalize", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_finalize_says_what_is_missing(tmp_path: Path, tiny_baichuan: Path) -> None:
    base = ["--model_name_or_path", tiny_baichuan, "--output_dir", tmp_path]
    nothing = finalize(*base)
    assert nothing.returncode == 2 and "Train first: make baichuan-train" in nothing.stderr
    (tmp_path / "checkpoint-5").mkdir()
    torn = finalize(*base, "--checkpoint", tmp_path / "checkpoint-5")
    assert torn.returncode == 2 and "is no complete checkpoint" in torn.stderr
    (tmp_path / "checkpoint-5" / saving.MARKER).write_text('{"identity": {"base_model": "other"}}')
    foreign = finalize(*base)
    assert foreign.returncode == 2 and "was trained from another model" in foreign.stderr
    assert not (tmp_path / "final").exists()


def test_the_check_finds_weights_that_do_not_fit(tmp_path: Path, tiny_baichuan: Path) -> None:
    from finetune.final_model import check_in_fresh_process, complete

    folder = tmp_path / "final"
    shutil.copytree(tiny_baichuan, folder)
    complete(folder, tiny_baichuan, norm_head=True)
    assert "loads and answers" in check_in_fresh_process(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="weights and configuration disagree: missing_keys"):
        check_in_fresh_process(folder)


def test_finalize_says_that_final_is_older_than_the_newest_checkpoint(tmp_path: Path) -> None:
    for name, step in (("final", 12), ("checkpoint-12", 12)):
        (tmp_path / name).mkdir()
        (tmp_path / name / saving.MARKER).write_text(json.dumps({"step": step}))
    assert newer_than(tmp_path / "final", tmp_path) == ""
    (tmp_path / "checkpoint-58").mkdir()
    (tmp_path / "checkpoint-58" / saving.MARKER).write_text('{"step": 58}')
    words = newer_than(tmp_path / "final", tmp_path)
    assert "of update 12." in words and f"--checkpoint {tmp_path / 'checkpoint-58'} makes it of update 58" in words
