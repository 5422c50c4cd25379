"""Merging an adapter: equal to peft's merge and to base + adapter, refused where it can't be exact, resumable."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune.merge
from finetune import merge_check
from finetune.errors import UserError
from finetune.merge import merge_adapter, write_merged
from finetune.merge_check import LIMITS, compare, compute_logits, require_rounding_only
from finetune.models import load_for_inference
from qwen_qlora.utils import merge_lora
from tests.adapters import make_adapter

IDS = torch.tensor([[5, 17, 300, 42, 7, 1999, 3]])


def read_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def adapter(tiny_qwen, tmp_path_factory):
    return make_adapter(tiny_qwen, tmp_path_factory.mktemp("merge") / "adapter")


@pytest.fixture(scope="module")
def base32(tiny_qwen, tmp_path_factory):
    """The tiny model in float32, with weights that no 16-bit number holds."""
    folder = tmp_path_factory.mktemp("merge32") / "base"
    shutil.copytree(tiny_qwen, folder)
    for file in folder.glob("*.safetensors"):
        save_file({k: v.float() * 1.001 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "whole layers": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "patterns": {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 6}, "alpha_pattern": {"0.self_attn.q_proj": 3}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_merge_equals_peft_and_base_plus_adapter(base32, tmp_path, name):
    adapter = make_adapter(base32, tmp_path / "adapter", **VARIANTS[name])
    merged_dir = tmp_path / "merged"
    merged_dir.mkdir()
    write_merged(base32, adapter, merged_dir)
    adapted, _ = load_for_inference(base32, adapter)
    merged, _ = load_for_inference(merged_dir)
    with torch.inference_mode():
        base_logits = load_for_inference(base32)[0](input_ids=IDS).logits
        expected, found = adapted(input_ids=IDS).logits, merged(input_ids=IDS).logits
    assert (expected - base_logits).abs().max() > 0.05, "the adapter should matter"
    assert (expected - found).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))
    theirs = adapted.merge_and_unload().state_dict()
    ours = read_tensors(merged_dir)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)


def test_16_bit_weights_are_rounded_once_and_untouched_ones_stay(tiny_qwen, adapter, tmp_path):
    write_merged(tiny_qwen, adapter, tmp_path)
    base, merged = read_tensors(tiny_qwen), read_tensors(tmp_path)
    lora = load_file(adapter / "adapter_model.safetensors")
    touched = {key.split("base_model.model.")[1].split(".lora_")[0] + ".weight" for key in lora}
    assert len(touched) == 14 and touched < base.keys() == merged.keys()
    for name, weight in base.items():
        assert merged[name].dtype == weight.dtype == torch.bfloat16
        if name in touched:
            prefix = "base_model.model." + name.removesuffix(".weight")
            a, b = lora[prefix + ".lora_A.weight"].double(), lora[prefix + ".lora_B.weight"].double()
            exact = weight.double() + 8 / 4 * b @ a
            # one of the two neighbours among numbers of 8 bits, and fp32's own rounding
            assert ((merged[name].double() - exact).abs() <= exact.abs() * 2**-7 + 1e-7).all()
        else:
            assert torch.equal(merged[name], weight)


def test_changes_below_the_last_place_survive(tiny_qwen, tmp_path):
    """What a short training changes: hundreds of times less than the distance between two 16-bit numbers."""
    adapter = make_adapter(tiny_qwen, tmp_path / "adapter", spread=2e-5)
    write_merged(tiny_qwen, adapter, tmp_path)
    base, merged = read_tensors(tiny_qwen), read_tensors(tmp_path)
    lora = load_file(adapter / "adapter_model.safetensors")
    shares = {"merged": [0.0, 0.0], "to the nearest": [0.0, 0.0]}
    for key in (key for key in lora if "lora_A" in key):
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        change = 8 / 4 * lora[key.replace("lora_A", "lora_B")].double() @ lora[key].double()
        weight = base[name].double()
        for way, found in (("merged", merged[name]), ("to the nearest", (weight + change).bfloat16())):
            shares[way][0] += ((found.double() - weight) * change).sum().item()
            shares[way][1] += change.square().sum().item()
    kept, nearest = (part / whole for part, whole in shares.values())
    assert kept == pytest.approx(1, abs=0.15) and nearest < 0.5, (kept, nearest)


def change_config(adapter_dir, **settings):
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base model"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"an_option_of_next_year": 3}, "an_option_of_next_year=3"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_what_has_no_exact_merge_is_refused(tiny_qwen, adapter, tmp_path, settings, reason):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    change_config(copy, **settings)
    with pytest.raises(UserError, match=f"cannot be merged exactly: .*{reason}"):
        write_merged(tiny_qwen, copy, tmp_path)


def test_adapted_and_shared_embeddings_are_refused(tiny_qwen, tmp_path):
    embedding = make_adapter(tiny_qwen, tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="lora_embedding_A"):
        write_merged(tiny_qwen, embedding, tmp_path)
    whole = make_adapter(tiny_qwen, tmp_path / "whole", modules_to_save=["embed_tokens"])
    tied = shutil.copytree(tiny_qwen, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="shares with its output layer"):
        write_merged(tied, whole, tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(tiny_qwen, adapter, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="not enough disk for the merged model"):
        write_merged(tiny_qwen, adapter, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def begin_merge(model_dir, adapter_dir, save_path, monkeypatch):
    """A merge that ends after all files are written."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finetune.merge, "check_merge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(model_dir, adapter_dir, save_path)


def fill_the_disk(monkeypatch):
    """Every small file is opened, which empties it, and then cannot be written."""

    def full(path, *_, **__):
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)


def test_a_full_disk_spoils_no_merge_begun(tiny_qwen, adapter, tmp_path, monkeypatch):
    begin_merge(tiny_qwen, adapter, tmp_path / "merged", monkeypatch)
    partial = tmp_path / "merged.partial"
    first = min(partial.glob("*.safetensors"))
    written = first.stat().st_mtime_ns
    with monkeypatch.context() as patched:  # the disk is full when it goes on: nothing small is to be written
        fill_the_disk(patched)
        begin_merge(tiny_qwen, adapter, tmp_path / "merged", patched)
    begin_merge(tiny_qwen, adapter, tmp_path / "merged", monkeypatch)
    assert first.stat().st_mtime_ns == written


def test_a_plan_that_a_full_disk_cut_off_is_none(tiny_qwen, adapter, tmp_path, monkeypatch, capsys):
    partial = tmp_path / "merged.partial"
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        fill_the_disk(patched)
        merge_adapter(tiny_qwen, adapter, tmp_path / "merged")
    assert not (partial / "merge_plan.json").exists()
    for text in (None, "", "{"):
        if text is not None:
            (partial / "merge_plan.json").write_text(text)
        begin_merge(tiny_qwen, adapter, tmp_path / "merged", monkeypatch)
        assert "without a readable plan, removed" in capsys.readouterr().out
    assert json.loads((partial / "merge_plan.json").read_text())["adapter_fingerprint"]
    assert not list(partial.glob("*.tmp"))


@pytest.mark.parametrize(("free", "on_cpu"), [(None, False), (80 * 10**9, False), (1_000_500_000, True)])
def test_a_model_larger_than_the_card_is_checked_on_the_cpu(
    tiny_qwen, adapter, tmp_path, monkeypatch, capsys, free, on_cpu
):
    """The tiny model's files take 0.75 MB; what runs beside the weights is counted as 1 GB."""
    started = []

    def run(command, env=None, **_):
        started.append((env or os.environ).get("CUDA_VISIBLE_DEVICES"))
        logits = torch.arange(8.0).view(2, 4)
        save_file({"token_ids": torch.tensor([1, 2]), "logits": logits, "base_logits": logits + 1}, command[4])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(merge_check, "free_card_bytes", lambda: free)
    monkeypatch.setattr(subprocess, "run", run)
    merge_check.check_merge(tiny_qwen, adapter, tmp_path)
    assert started == (["-1", "-1"] if on_cpu else ["0", "0"])
    assert ("checking on the CPU" in capsys.readouterr().out) == on_cpu


def test_a_check_that_the_system_kills_says_what_that_means(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "killed"))
    (tmp_path / "killed").write_text("#!/bin/bash\nkill -KILL $$\n")
    (tmp_path / "killed").chmod(0o755)
    with pytest.raises(UserError, match="was killed, as happens when main memory runs out"):
        merge_check._fresh_process([], on_cpu=True)


def test_a_forgotten_adapter_is_found_by_the_check(tiny_qwen, adapter, tmp_path):
    compute_logits(tiny_qwen, adapter, tmp_path / "adapter.safetensors")
    compute_logits(tiny_qwen, None, tmp_path / "base.safetensors")
    expected, found = load_file(tmp_path / "adapter.safetensors"), load_file(tmp_path / "base.safetensors")
    assert torch.equal(expected["base_logits"], found["logits"])
    result = compare(expected, found)
    assert result["max_abs_difference"] == result["adapter_max_abs_effect"] > 0
    assert result["relative_rms_difference"] > LIMITS["bfloat16"]
    with pytest.raises(UserError, match="not marked as done"):
        require_rounding_only(result, "bfloat16", tmp_path)
    with pytest.raises(UserError, match="other token ids"):
        compare(expected, found | {"token_ids": found["token_ids"] + 1})


def test_a_check_that_tells_little_says_so(tmp_path, capsys):
    result = {"max_abs_difference": 0.01, "relative_rms_difference": 0.001, "argmax_agreement": 1.0, "tokens": 9}
    require_rounding_only(result | {"adapter_max_abs_effect": 0.01}, "bfloat16", tmp_path)
    assert "tell little" in capsys.readouterr().out
    require_rounding_only(result | {"adapter_max_abs_effect": 0.5}, "bfloat16", tmp_path)
    assert "tell little" not in capsys.readouterr().out


def test_compare_by_hand():
    want = torch.tensor([[1.0, 3.0], [0.0, 4.0]])  # mean 2, mean square around it (1 + 1 + 4 + 4) / 4
    have = torch.tensor([[1.0, 3.0], [4.0, 0.0]])  # squared difference (16 + 16) / 4
    ids = torch.tensor([1, 2])
    result = compare({"token_ids": ids, "logits": want, "base_logits": want + 0.5}, {"token_ids": ids, "logits": have})
    assert result["max_abs_difference"] == 4
    assert result["relative_rms_difference"] == pytest.approx((8 / 2.5) ** 0.5)
    assert result["argmax_agreement"] == 0.5
    assert result["adapter_max_abs_effect"] == 0.5
    assert result["tokens"] == 2


def test_an_interrupted_merge_goes_on_and_a_finished_one_says_so(tiny_qwen, adapter, tmp_path, monkeypatch, capsys):
    save_path = tmp_path / "merged"
    partial = tmp_path / "merged.partial"

    begin_merge(tiny_qwen, adapter, save_path, monkeypatch)
    assert not save_path.exists()
    first, second = sorted(partial.glob("*.safetensors"))[:2]
    second.unlink()
    written = first.stat().st_mtime_ns

    words = {"--model_name_or_path": tiny_qwen, "--adapter_name_or_path": adapter, "--save_path": save_path}
    monkeypatch.setattr(sys, "argv", ["merge_lora", *(str(word) for pair in words.items() for word in pair)])
    merge_lora.main()
    output = capsys.readouterr().out
    assert "max abs difference" in output and "argmax agreement" in output
    assert not partial.exists()
    assert (save_path / first.name).stat().st_mtime_ns == written

    copied = {path.name for path in tiny_qwen.iterdir()} - {"conversion.json"}
    assert {path.name for path in save_path.iterdir()} == copied | {"merge.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in save_path.iterdir()} == {0o644}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (save_path / name).read_bytes() == (tiny_qwen / name).read_bytes()
    check = json.loads((save_path / "merge.json").read_text())["check"]
    assert check["dtype"] == "bfloat16" and check["argmax_agreement"] > 0.9
    assert check["relative_rms_difference"] < 0.02 < check["adapter_max_abs_effect"]

    capsys.readouterr()
    merge_adapter(tiny_qwen, adapter, save_path)
    assert capsys.readouterr().out == f"already done: {save_path}\n"
    other = make_adapter(tiny_qwen, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="holds the merge of"):
        merge_adapter(tiny_qwen, other, save_path)
    with pytest.raises(UserError, match="was trained on"):
        merge_adapter(save_path, adapter, tmp_path / "twice")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    with pytest.raises(UserError, match="no merged model"):
        merge_adapter(tiny_qwen, adapter, tmp_path / "foreign")
    with pytest.raises(UserError, match="expected a new folder"):
        merge_adapter(tiny_qwen, adapter, adapter)


def test_a_torn_file_of_an_interrupted_merge_is_written_again(tiny_qwen, adapter, tmp_path, monkeypatch):
    save_path = tmp_path / "merged"
    begin_merge(tiny_qwen, adapter, save_path, monkeypatch)
    torn = sorted((tmp_path / "merged.partial").glob("*.safetensors"))[0]
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-100])
    merge_adapter(tiny_qwen, adapter, save_path)
    assert (save_path / torn.name).read_bytes() == whole


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_record_of_a_merge_is_told_in_a_line(tiny_qwen, adapter, tmp_path, content):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge.json").write_text(content)
    with pytest.raises(UserError, match="merge.json:1: not JSON|expected an object|holds the merge of None into None"):
        merge_adapter(tiny_qwen, adapter, tmp_path / "merged")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_to_another_disk_is_followed(tiny_qwen, adapter, tmp_path, is_there):
    place = tmp_path / "data disk" / "merged"
    place.parent.mkdir()
    if is_there:
        place.mkdir()
    (tmp_path / "link").symlink_to(place)
    merge_adapter(tiny_qwen, adapter, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (place / "merge.json").exists()
    assert [path.name for path in place.parent.iterdir()] == ["merged"]
