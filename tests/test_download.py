"""Downloads from a real hub on a loopback port: complete, cut, corrupted, stopped, refused."""

import collections
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.download import Wish, download_model, fetch_model, is_finished, write_record
from finetune.errors import UserError
from finetune.hub_files import needed_files
from finetune.hubs import RemoteFile
from finetune.transfer import bytes_present, progress_lines
from llm_code.llm_download import baichuan2_7B_base_download
from tests.hub import Hub

MODEL_ID = "qwen/Qwen-14B-Chat"
SHARD = "model-00003-of-00003.safetensors"
SOURCES = ["modelscope", "huggingface"]


@pytest.fixture
def hub(tmp_path, tiny_qwen_original, monkeypatch):
    """A hub with the tiny Qwen as revision v1.0.8, its clients pointed at it."""
    folder = shutil.copytree(tiny_qwen_original, tmp_path / "on_hub")
    for name in ("modeling_qwen.py", "pytorch_model.bin", "model.gguf", "logo.png"):
        (folder / name).write_text("not needed")
    with Hub() as hub:
        hub.add(MODEL_ID, "v1.0.8", folder)
        point_at(hub.endpoint, tmp_path, monkeypatch)
        yield hub


def point_at(endpoint, tmp_path, monkeypatch):
    """The environment a person has, with the clients' own folders below tmp_path."""
    import huggingface_hub.constants

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for key in ("MODELSCOPE_CACHE", "MODELSCOPE_HOME", "HF_HOME"):
        monkeypatch.setenv(key, str(tmp_path / key))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def wish(tmp_path, source="modelscope", revision="v1.0.8", model_id=MODEL_ID, keep_original=True):
    return Wish(source, model_id, revision, tmp_path / "base", tmp_path / "base" / "native", keep_original)


def command_line(wish, module="qwen_qlora.qwen_download"):
    """The command line the make target runs."""
    command = [sys.executable, "-m", module, "--model_id", wish.model_id, "--revision", wish.revision]
    command += ["--source", wish.source, "--download_dir", str(wish.download_dir), "--model_dir", str(wish.model_dir)]
    return [*command, "--keep_original", str(int(wish.keep_original))]


def run_program(wish):
    return subprocess.Popen(command_line(wish), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("source", SOURCES)
def test_program_downloads_and_converts(tmp_path, hub, tiny_qwen, source):
    wanted = wish(tmp_path, source, keep_original=source == "modelscope")
    process = run_program(wanted)
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, f"{wanted.model_dir}\n"), errors
    assert weights(wanted.model_dir) == weights(tiny_qwen)
    marker = json.loads((wanted.model_dir / "conversion.json").read_text())
    assert marker["download"] == {"source": source, "model_id": MODEL_ID, "revision": "v1.0.8", "complete": True}
    original = tmp_path / "base" / MODEL_ID
    kept = {path.name for path in original.iterdir()}
    assert kept.isdisjoint({"modeling_qwen.py", "pytorch_model.bin", "model.gguf", "logo.png"})
    assert (SHARD in kept) == wanted.keep_original and {"LICENSE", "NOTICE", "qwen.tiktoken"} <= kept
    assert {stat.S_IMODE(path.stat().st_mode) for path in original.iterdir()} == {0o644}
    asked = len(hub.requests)
    process = run_program(wanted)
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, f"{wanted.model_dir}\n")
    assert "already done" in errors and len(hub.requests) == asked


@pytest.mark.parametrize("source", SOURCES)
def test_cut_connection_is_resumed(tmp_path, hub, tiny_qwen, source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # 10 MB: more than the tiny file
    hub.cut_once[SHARD] = 100_000
    target = download_model(wish(tmp_path, source))
    assert weights(target) == weights(tiny_qwen)
    first, second = hub.transfers(SHARD)
    assert first is None and int(second.removeprefix("bytes=").rstrip("-")) >= 65_536


def test_progress_in_a_log(tmp_path, capsys):
    with progress_lines(tmp_path, 2_000_000_000, seconds=0.05):
        os.truncate(os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR), 1_000_000_000)  # sparse
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all(line.startswith("1.0 of 2.0 GB downloaded, ") for line in lines)


def test_killed_download_goes_on(tmp_path, hub, tiny_qwen):
    wanted = wish(tmp_path)
    hub.hold[SHARD] = 200_000
    process = run_program(wanted)
    assert hub.holding.wait(60)
    done = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    deadline = time.monotonic() + 30
    while not all((tmp_path / "base" / MODEL_ID / name).exists() for name in done) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not wanted.model_dir.exists() and not (tmp_path / "base" / MODEL_ID / SHARD).exists()
    asked = len(hub.requests)
    assert weights(download_model(wanted)) == weights(tiny_qwen)
    again = [path for _, path, _ in hub.requests[asked:]]
    assert any(path.endswith(f"FilePath={SHARD}") for path in again)
    assert not any(path.endswith(f"FilePath={name}") for path in again for name in done)


@pytest.mark.parametrize("source", SOURCES)
def test_corrupted_file_is_never_converted(tmp_path, hub, source, monkeypatch):
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    hub.corrupt.add(SHARD)
    with pytest.raises(UserError, match=SHARD) as caught:
        download_model(wish(tmp_path, source))
    assert "\n" not in str(caught.value) and not (tmp_path / "base" / "native").exists()
    assert not (tmp_path / "base" / MODEL_ID / SHARD).exists()
    hub.corrupt.clear()
    download_model(wish(tmp_path, source))


@pytest.mark.parametrize("source", SOURCES)
def test_damage_on_the_disk_is_mended(tmp_path, hub, tiny_qwen, source):
    """A file of the right size with wrong bytes, as an earlier broken disk or a foreign tool would leave it."""
    folder = tmp_path / "base" / MODEL_ID
    shutil.copytree(hub.models[MODEL_ID]["v1.0.8"], folder)
    data = bytearray((folder / SHARD).read_bytes())
    data[-7] ^= 4
    (folder / SHARD).write_bytes(data)
    assert weights(download_model(wish(tmp_path, source))) == weights(tiny_qwen)


def test_shard_lost_after_the_download_is_fetched_again(tmp_path, hub, tiny_qwen):
    target = download_model(wish(tmp_path))
    shutil.rmtree(target)
    (tmp_path / "base" / MODEL_ID / SHARD).unlink()
    assert weights(download_model(wish(tmp_path))) == weights(tiny_qwen)


def test_conversion_goes_on_without_the_hub(tmp_path, hub, monkeypatch):
    """Stopped while converting with originals removed on the way: the second start neither asks nor fetches."""
    from finetune.checkpoint import weights as module

    write_unit, written = module.write_unit, []

    def stop_at_second(unit, source, partial):
        if written:
            raise KeyboardInterrupt
        written.append(unit)
        return write_unit(unit, source, partial)

    monkeypatch.setattr(module, "write_unit", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        download_model(wish(tmp_path, keep_original=False))
    monkeypatch.setattr(module, "write_unit", write_unit)
    assert len(weights(tmp_path / "base" / MODEL_ID)) == 2
    asked = len(hub.requests)
    assert (download_model(wish(tmp_path, keep_original=False)) / "conversion.json").exists()
    assert len(hub.requests) == asked


@pytest.mark.parametrize("source", SOURCES)
def test_native_model_needs_no_conversion(tmp_path, hub, tiny_qwen, source, capsys):
    hub.add("qwen/native", "main", tiny_qwen)
    wanted = wish(tmp_path, source, "main", "qwen/native")
    assert download_model(wanted) == wanted.model_dir
    assert weights(wanted.model_dir) == weights(tiny_qwen)
    assert not (tmp_path / "base" / "qwen").exists() and not (wanted.model_dir / ".cache").exists()
    assert "native already" in capsys.readouterr().err
    hub.status = 500
    assert download_model(wanted) == wanted.model_dir
    assert "already done" in capsys.readouterr().err


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "v9"}, "qwen/Qwen-14B-Chat has no revision v9 on .*: it has v1.0.8"),
        ({"model_id": "qwen/none"}, "has no model qwen/none. Check the model id, or set SOURCE="),
    ],
)
def test_unknown_names(tmp_path, hub, source, changes, message):
    with pytest.raises(UserError, match=message):
        download_model(wish(tmp_path, source, **changes))
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_model_that_wants_a_token(tmp_path, hub, source):
    hub.status = 403
    key = "MODELSCOPE_API_TOKEN" if source == "modelscope" else "HF_TOKEN"
    with pytest.raises(UserError, match=rf"refuses qwen/Qwen-14B-Chat \(HTTP 403\).* or set {key}"):
        download_model(wish(tmp_path, source))


@pytest.mark.parametrize("source", SOURCES)
def test_unreachable_hub(tmp_path, source, monkeypatch, unused_port):
    endpoint = f"http://127.0.0.1:{unused_port}"
    point_at(endpoint, tmp_path, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the clients wait between their attempts
    monkeypatch.setattr("modelscope_hub._download_control._DownloadControl.sleep", lambda *_: None)
    with pytest.raises(UserError, match=rf"cannot reach {endpoint}: .*Connection refused.*or SOURCE="):
        download_model(wish(tmp_path, source))


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as taken:  # bound but not listening: connections are refused, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_error_is_one_line_and_status_two(tmp_path, hub):
    process = run_program(wish(tmp_path, revision="v9"))
    _, errors = process.communicate()
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1] == f"error: {MODEL_ID} has no revision v9 on {hub.endpoint}: it has v1.0.8."


def test_disk_is_checked_from_the_listed_sizes(tmp_path, hub, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("finetune.checkpoint.disk.shutil.disk_usage", lambda _: usage(0, 0, 101_000_000))
    with pytest.raises(UserError, match="not enough disk for the download and its native form: .* KEEP_ORIGINAL=0"):
        download_model(wish(tmp_path))
    assert not hub.transfers(SHARD)
    monkeypatch.setattr("finetune.checkpoint.disk.shutil.disk_usage", lambda _: usage(0, 0, 101_200_000))
    download_model(wish(tmp_path, keep_original=False))


def test_a_download_in_part_counts_with_both_hubs_partial_files(tmp_path):
    files = [RemoteFile("a.safetensors", 2000), RemoteFile("b.safetensors", 2000), RemoteFile("sub/c.json", 9)]
    assert bytes_present(tmp_path, files) == 0
    partial = tmp_path / ".cache" / "huggingface" / "download"
    (partial / "sub").mkdir(parents=True)
    (tmp_path / "a.safetensors").write_bytes(bytes(2000))
    (partial / "AbC=.etag.incomplete").write_bytes(bytes(1000))
    (partial / "sub" / "DeF=.etag.incomplete").write_bytes(bytes(5))
    (partial / "a.safetensors.metadata").write_bytes(bytes(70))
    assert bytes_present(tmp_path, files) == 3005


def test_full_disk_is_one_line(tmp_path, hub, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelscope_hub._download._finish_download", full)
    with pytest.raises(UserError, match="the disk is full. Free some and run again"):
        download_model(wish(tmp_path))


def test_model_that_cannot_be_used_is_refused_before_the_long_part(tmp_path, hub):
    config = hub.models[MODEL_ID]["v1.0.8"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"no_bias": False}))
    with pytest.raises(UserError, match="no_bias is False"):
        download_model(wish(tmp_path))
    assert not hub.transfers(SHARD) and not (tmp_path / "base").exists()


def test_one_folder_for_original_and_converted_is_refused_before_the_long_part(tmp_path, hub):
    both = replace(wish(tmp_path), model_dir=tmp_path / "base" / MODEL_ID)
    with pytest.raises(UserError, match="would hold the original and the converted model"):
        download_model(both)
    assert not hub.transfers(SHARD)


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path, hub):
    (tmp_path / "base").touch()
    with pytest.raises(UserError, match=r"base.*: Not a directory\. Name a folder you may write to \(BASE_MODEL_DIR"):
        download_model(wish(tmp_path))


def test_index_that_names_a_file_the_hub_has_not(tmp_path, hub):
    (hub.models[MODEL_ID]["v1.0.8"] / SHARD).unlink()
    with pytest.raises(UserError, match=f"its index names {SHARD}, which is not there"):
        download_model(wish(tmp_path))


def test_the_same_model_from_another_hub_is_not_to_be_removed(tmp_path, hub):
    download_model(wish(tmp_path))
    with pytest.raises(UserError, match="from modelscope, wanted huggingface. If it is as good, nothing is left to do"):
        download_model(wish(tmp_path, source="huggingface"))


def test_a_half_download_is_not_called_the_model(tmp_path):
    begun = wish(tmp_path)
    begun.model_dir.mkdir(parents=True)
    write_record(begun.model_dir, begun, complete=False)
    assert not is_finished(begun)
    with pytest.raises(UserError, match="Name another folder, or remove this one"):
        is_finished(wish(tmp_path, source="huggingface"))


def test_folders_of_other_models_are_left_alone(tmp_path, hub):
    download_model(wish(tmp_path))
    hub.add(MODEL_ID, "v1.0.9", hub.models[MODEL_ID]["v1.0.8"])
    with pytest.raises(UserError, match="holds qwen/Qwen-14B-Chat v1.0.8 from modelscope, wanted .* v1.0.9"):
        download_model(wish(tmp_path, revision="v1.0.9"))
    shutil.rmtree(tmp_path / "base" / "native")
    with pytest.raises(UserError, match="holds v1.0.8 from modelscope, wanted v1.0.9 .*Remove it first: rm -r"):
        download_model(wish(tmp_path, revision="v1.0.9"))
    (tmp_path / "base" / "native").mkdir()
    (tmp_path / "base" / "native" / "thesis.txt").write_text("mine")
    shutil.rmtree(tmp_path / "base" / "qwen")
    with pytest.raises(UserError, match="is not empty and holds no finished conversion"):
        download_model(wish(tmp_path))


def test_baichuan_program(tmp_path, hub, tiny_baichuan_original, tiny_baichuan, monkeypatch, capsys):
    hub.add("baichuan-inc/Baichuan2-7B-Chat", "v1.0.2", tiny_baichuan_original)
    wanted = wish(tmp_path, revision="v1.0.2", model_id="baichuan-inc/Baichuan2-7B-Chat")
    monkeypatch.setattr(sys, "argv", command_line(wanted, "baichuan")[2:])
    baichuan2_7B_base_download.main()
    assert capsys.readouterr().out == f"{wanted.model_dir}\n"
    assert weights(wanted.model_dir) == weights(tiny_baichuan)


def test_which_files_are_needed():
    names = "config.json vocab.json merges.txt tokenizer.model tokenizer.json chat_template.jinja LICENSE NOTICE.md "
    names += "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
    wanted = sorted(names.split())
    names += (
        "README.md modeling_x.py pytorch_model.bin pytorch_model.bin.index.json model.fp16.safetensors tf_model.h5 "
    )
    names += "onnx/model.onnx x.gguf assets/a.png original/params.json consolidated.safetensors"
    files = [RemoteFile(name, 1) for name in names.split()]
    assert [file.path for file in needed_files(files)] == wanted
    only_bin = [file for file in files if not file.path.endswith((".safetensors", "safetensors.index.json"))]
    assert [f.path for f in needed_files(only_bin) if "model" in f.path] == [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.model",
    ]
    with pytest.raises(UserError, match="no weights"):
        needed_files([RemoteFile("config.json", 1)])


@pytest.mark.parametrize("module", ["qwen_qlora.qwen_download", "llm_code.llm_download.baichuan2_7B_base_download"])
def test_programs_answer_help_without_heavy_imports(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'modelscope'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert os.path.exists(Path(*module.split(".")).with_suffix(".py"))


def test_a_model_of_ones_own_is_not_overwritten(tmp_path, hub, tiny_qwen):
    """As with QWEN_MODEL_DIR pointed at a merged model."""
    hub.add("me/native", "v1", shutil.copytree(tiny_qwen, tmp_path / "native_on_hub"))
    wanted = wish(tmp_path, revision="v1", model_id="me/native")
    mine = shutil.copytree(tiny_qwen, wanted.model_dir)
    (mine / "conversion.json").unlink()
    shard = mine / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    before = shard.read_bytes()
    with pytest.raises(UserError, match="holds another model: model-00003"):
        download_model(wanted)
    assert shard.read_bytes() == before


@pytest.mark.parametrize("is_link", [False, True])
def test_converted_shard_lost_with_its_original(tmp_path, hub, tiny_qwen, is_link):
    from tests.test_checkpoint_resume import killed_conversion

    wanted = wish(tmp_path, keep_original=False)
    place = wanted.model_dir
    if is_link:
        place = tmp_path / "disk" / "native"
        place.mkdir(parents=True)
        wanted.download_dir.mkdir()
        wanted.model_dir.symlink_to(place)
    fetch_model(wanted, wanted.download_dir / MODEL_ID)
    killed_conversion(wanted.download_dir / MODEL_ID, place, "second file recorded, source not removed")
    hub.requests.clear()
    if not is_link:
        (place.with_name("native.partial") / "model-00001-of-00003.safetensors").unlink()
    assert weights(download_model(wanted)) == weights(tiny_qwen)
    assert bool(hub.requests) is not is_link
