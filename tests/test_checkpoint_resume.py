"""A conversion killed anywhere goes on and ends like one that was not; source files are removed only when safe."""

import collections
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from finetune.checkpoint import convert, manifest, verify, weights
from finetune.checkpoint.convert import convert_checkpoint
from finetune.errors import UserError


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path, tiny_qwen_original):
    return shutil.copytree(tiny_qwen_original, tmp_path / "qwen_original")


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number, function):
    """`function`, killed with the process when it is called for the number-th time."""
    calls = iter(range(1, number))
    return lambda *args, **kwargs: function(*args, **kwargs) if next(calls, None) else die()


def die_after_call(number, function):
    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(None)
        return die() if len(calls) == number else result

    calls = []
    return run


# Where a run of three files is killed: module, function, and whether before or after its n-th call.
KILLS = {
    "in the middle of the first file": (weights, "piece_rows", die_at_call, 5),
    "in the middle of the second file": (weights, "piece_rows", die_at_call, 12),
    "second file written, not verified": (verify, "check_file", die_at_call, 2),
    "second file verified, not recorded": (verify, "check_file", die_after_call, 2),
    "second file recorded, source not removed": (manifest, "save", die_after_call, 3),
    "all files done": (verify, "check_weights", die_at_call, 1),
    "marker written, folder not renamed": (convert, "write_json", die_after_call, 1),
}


def killed_conversion(source, target, where, keep_original=False):
    """Convert in a forked process that kills itself with SIGKILL at the place."""
    module, name, wrapper, number = KILLS[where]
    pid = os.fork()
    if pid == 0:
        setattr(module, name, wrapper(number, getattr(module, name)))
        convert_checkpoint(source, target, keep_original)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("where", KILLS)
def test_killed_and_continued(tmp_path, source, tiny_qwen, where, capsys):
    target = tmp_path / "qwen"
    killed_conversion(source, target, where)
    assert not target.exists()
    convert_checkpoint(source, target, keep_original=False)
    assert digests(target) == digests(tiny_qwen)
    assert not (tmp_path / "qwen.partial").exists()
    assert not list(source.glob("*.safetensors"))
    if where == "all files done":
        assert "continuing: 3 of 3 files are converted and verified" in capsys.readouterr().err


def test_recorded_file_that_vanished_is_made_again(tmp_path, source, tiny_qwen):
    target = tmp_path / "qwen"
    killed_conversion(source, target, "all files done", keep_original=True)
    (tmp_path / "qwen.partial" / "model-00002-of-00003.safetensors").unlink()
    convert_checkpoint(source, target)
    assert digests(target) == digests(tiny_qwen)


def test_lost_source_is_named(tmp_path, source):
    killed_conversion(source, tmp_path / "qwen", "second file recorded, source not removed")
    (source / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="not converted yet are missing, first model-00003-of-00003.safetensors"):
        convert_checkpoint(source, tmp_path / "qwen")


def test_interrupted_conversion_of_another_source(tmp_path, source):
    killed_conversion(source, tmp_path / "qwen", "in the middle of the second file")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"seq_length": 1024}))
    with pytest.raises(UserError, match="interrupted conversion of another checkpoint"):
        convert_checkpoint(source, tmp_path / "qwen")


def test_disk_that_lies_is_noticed(tmp_path, source, monkeypatch):
    """A file that reads back differently is never recorded, and its source is kept."""

    def write_wrong(target, places, tensors):
        write_shard(target, places, tensors)
        with open(target, "r+b") as stream:
            stream.seek(-5, os.SEEK_END)
            stream.write(b"\x7f")

    write_shard = weights.write_shard
    monkeypatch.setattr(weights, "write_shard", write_wrong)
    with pytest.raises(UserError, match="read back differs from what was written"):
        convert_checkpoint(source, tmp_path / "qwen", keep_original=False)
    assert len(list(source.glob("*.safetensors"))) == 3


def free(monkeypatch, num_bytes):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("finetune.checkpoint.disk.shutil.disk_usage", lambda _: usage(num_bytes, 0, num_bytes))


def test_disk_is_checked_with_what_removal_frees(tmp_path, source, monkeypatch):
    monkeypatch.setattr("finetune.checkpoint.disk.RESERVE_BYTES", 0)
    sizes = [path.stat().st_size for path in sorted(source.glob("*.safetensors"))]
    free(monkeypatch, sum(sizes) - 20_000)
    with pytest.raises(UserError, match=r"not enough disk .* expected 0.00[0-9]+ GB free .* KEEP_ORIGINAL=0"):
        convert_checkpoint(source, tmp_path / "qwen")
    assert not (tmp_path / "qwen.partial").exists()
    free(monkeypatch, max(sizes) // 2)
    with pytest.raises(UserError, match="not enough disk"):
        convert_checkpoint(source, tmp_path / "qwen", keep_original=False)
    free(monkeypatch, max(sizes) + 1000)
    convert_checkpoint(source, tmp_path / "qwen", keep_original=False)
    assert not list(source.glob("*.safetensors"))


def test_disk_that_fills_up_meanwhile(tmp_path, source, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_shard", full)
    with pytest.raises(UserError, match="is full. Free some and run again: it goes on"):
        convert_checkpoint(source, tmp_path / "qwen")


def test_modes_licences_and_marker(tiny_qwen, tiny_qwen_original, tiny_baichuan):
    for folder in (tiny_qwen, tiny_baichuan):
        assert not (folder / "conversion_manifest.json").exists() and not list(folder.glob("*.tmp"))
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert (tiny_qwen / "LICENSE").read_bytes() == (tiny_qwen_original / "LICENSE").read_bytes()
    assert "Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud" in (tiny_qwen / "Notice.txt").read_text()
    assert "L2-normalised" in (tiny_baichuan / "CONVERTED.md").read_text()
    markers = [json.loads((folder / "conversion.json").read_text()) for folder in (tiny_qwen, tiny_baichuan)]
    assert [(m["layout"], m["norm_head"]) for m in markers] == [("qwen1", False), ("baichuan2", True)]


def test_configs(tiny_qwen, tiny_qwen_original, tiny_baichuan):
    def load(folder, name):
        return json.loads((folder / name).read_text())

    qwen, baichuan = load(tiny_qwen, "config.json"), load(tiny_baichuan, "config.json")
    assert (qwen["intermediate_size"], qwen["max_position_embeddings"], qwen["pad_token_id"]) == (128, 2048, None)
    assert (qwen["dtype"], qwen["torch_dtype"], qwen["rope_theta"]) == ("bfloat16", "bfloat16", 10000.0)
    assert (baichuan["pad_token_id"], baichuan["max_position_embeddings"]) == (0, 4096)
    generation = load(tiny_qwen, "generation_config.json")
    ranks = len((tiny_qwen_original / "qwen.tiktoken").read_text().splitlines())
    stops = [ranks + 2, ranks, ranks + 1]
    assert generation["eos_token_id"] == stops and generation["pad_token_id"] == ranks
    assert (generation["top_p"], generation["repetition_penalty"], generation["top_k"]) == (0.8, 1.1, 0)
    assert load(tiny_baichuan, "generation_config.json")["repetition_penalty"] == 1.05
    assert AutoModelForCausalLM.from_pretrained(tiny_qwen).generation_config.eos_token_id == stops


def test_research_licence_is_named(tmp_path, source):
    (source / "LICENSE").write_text("Tongyi Qianwen RESEARCH LICENSE AGREEMENT\n")
    target = convert_checkpoint(source, tmp_path / "qwen")
    assert "Tongyi Qianwen RESEARCH LICENSE AGREEMENT, Copyright" in (target / "Notice.txt").read_text()


def test_second_process_is_refused(tmp_path, source):
    with convert.only_one(source), pytest.raises(UserError, match="another process is converting"):
        convert_checkpoint(source, tmp_path / "qwen")


def run_program(*arguments):
    command = [sys.executable, "-m", "finetune.checkpoint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_program(tmp_path, source):
    target = tmp_path / "out" / "qwen"
    first = run_program(source, target, "--keep_original", "0")
    assert (first.returncode, first.stdout) == (0, f"{target}\n")
    assert re.search(r"model-00003-of-00003.safetensors: ([0-9.]+ GB) of \1 converted, 0 s to go", first.stderr)
    missing = run_program(tmp_path / "nowhere", target)
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1


def test_finished_and_native_are_left_alone(tmp_path, source, tiny_qwen, capsys):
    target = convert_checkpoint(source, tmp_path / "qwen")
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert convert_checkpoint(source, target) == target
    assert "already done: " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert convert_checkpoint(tiny_qwen, tmp_path / "other") == tiny_qwen
    assert "is native already (qwen2): nothing to convert" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_planning_needs_no_heavy_import():
    code = "import sys, finetune.checkpoint.__main__; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_checkpoint_of_the_same_shape(tmp_path, source):
    """A chat model and its base have one config and files of one size."""
    from tests.tiny.build_qwen1 import build_qwen1

    base = build_qwen1(tmp_path / "base_original", seed=1)
    killed_conversion(source, tmp_path / "qwen", "in the middle of the second file", keep_original=True)
    with pytest.raises(UserError, match="interrupted conversion of another checkpoint"):
        convert_checkpoint(base, tmp_path / "qwen")
    convert_checkpoint(source, tmp_path / "qwen")
    with pytest.raises(UserError, match="holds the conversion of another checkpoint"):
        convert_checkpoint(base, tmp_path / "qwen")


def test_a_converted_file_that_was_cut_is_converted_again(tmp_path, source):
    killed_conversion(source, tmp_path / "qwen", "in the middle of the second file", keep_original=True)
    first = sorted((tmp_path / "qwen.partial").glob("model-*"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:1000])
    assert (convert_checkpoint(source, tmp_path / "qwen") / first.name).read_bytes() == whole


def test_the_manifest_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut leaves the old one or the new one, whole; and its name is not lost once it is relied upon."""
    done, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda opened: done.append(Path(os.readlink(f"/proc/self/fd/{opened}")).name))
    monkeypatch.setattr(Path, "replace", lambda path, target: done.append("renamed") or replace(path, target))
    manifest.save(manifest.Manifest("qwen1", {}, {}, []), tmp_path)
    assert done == ["conversion_manifest.tmp", "renamed", tmp_path.name]
