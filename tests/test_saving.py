"""Folders written aside and renamed, found again, rotated; other experiments refused; disk counted beforehand."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from finetune import saving
from finetune.errors import UserError

IDENTITY = {"base_model": "aaaa", "lora_rank": 64, "rows_per_update": 32}


def write(output_dir: Path, step: int, identity: dict | None = None, names: dict | None = None) -> Path:
    written = saving.aside_dir(output_dir) / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_text(str(step))
    target = saving.checkpoint_dir(output_dir, step)
    saving.publish(written, target, {"identity": identity or IDENTITY, "names": names or {}, "step": step})
    return target


def test_publishing_renames_and_replaces_a_torn_folder(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoint-5"
    torn.mkdir()
    (torn / "weights").write_text("half")
    assert not saving.is_complete(torn)
    assert write(tmp_path, 5) == torn
    assert (torn / "weights").read_text() == "5"
    assert saving.read_marker(torn)["step"] == 5
    assert not (saving.aside_dir(tmp_path) / "checkpoint-5").exists()


@pytest.mark.parametrize("name", ["rename", "rmtree"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_no_torn_one_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    """Killed just before the first or second renaming, or half-way through the first or second removal."""
    write(tmp_path, 5)
    calls = []

    def killed(path: str | Path, *more, **options) -> None:
        calls.append(path)
        if len(calls) == call:
            if name == "rmtree":
                (Path(path) / "weights").unlink(missing_ok=True)
            raise KeyboardInterrupt
        return real(path, *more, **options)

    module = shutil if name == "rmtree" else os
    real = getattr(module, name)
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 5)
    monkeypatch.undo()
    folder = tmp_path / "checkpoint-5"
    assert not saving.is_complete(folder) or (folder / "weights").read_text() == "5"
    saving.clear_aside(tmp_path)
    write(tmp_path, 5)
    assert saving.is_complete(folder) and not list(saving.aside_dir(tmp_path).iterdir())


def test_the_newest_complete_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    assert saving.newest_checkpoint(tmp_path) == (None, [])
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-100" / saving.MARKER).write_text('{"step": 1')
    newest, remarks = saving.newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    assert len(remarks) == 1 and "checkpoint-100" in remarks[0] and "skipped" in remarks[0]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step)
    (tmp_path / "checkpoint-8" / saving.MARKER).write_bytes(b'{"step": 8, "\xff')
    removed = saving.rotate(tmp_path, 2, best=tmp_path / "checkpoint-2")
    assert sorted(path.name for path in removed) == ["checkpoint-4", "checkpoint-8"]
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [10, 6, 2]
    saving.rotate(tmp_path, 1)
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [10]


@pytest.mark.parametrize("is_relative", [False, True])
def test_rotation_frees_what_a_link_leads_to(tmp_path: Path, is_relative: bool) -> None:
    moved = tmp_path / "other disk"
    shutil.move(write(tmp_path / "out", 1), moved)
    (tmp_path / "out" / "checkpoint-1").symlink_to(Path("..", moved.name) if is_relative else moved)
    bystander = tmp_path / "out" / moved.name / "file"  # where a relative link would lead from .saving/
    bystander.parent.mkdir()
    bystander.touch()
    write(tmp_path / "out", 2)
    saving.rotate(tmp_path / "out", 1)
    assert not moved.exists() and [step for step, _ in saving.list_checkpoints(tmp_path / "out")] == [2]
    assert bystander.exists() and not list(saving.aside_dir(tmp_path / "out").iterdir())


def _overlay(folders: set[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of a container's image, which overlayfs renames for nobody."""
    rename = os.rename

    def refused(path: Path, target: Path) -> None:
        if Path(path) in folders:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        rename(path, target)

    monkeypatch.setattr(os, "rename", refused)


def test_folders_of_a_containers_image_are_removed_and_replaced(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "global_step").mkdir()
    _overlay({tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"}, monkeypatch)
    saving.rotate(tmp_path, 1)
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [2]
    write(tmp_path, 2)
    assert not (tmp_path / "checkpoint-2" / "global_step").exists()
    assert saving.newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


def test_a_kill_while_one_is_removed_leaves_a_torn_folder_of_ours(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    _overlay({tmp_path / "checkpoint-1"}, monkeypatch)

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        saving.rotate(tmp_path, 1)
    monkeypatch.undo()
    assert not saving.is_complete(tmp_path / "checkpoint-1")
    saving.check_nothing_foreign(tmp_path)
    saving.rotate(tmp_path, 1)
    assert [step for step, _ in saving.list_checkpoints(tmp_path)] == [2]


def test_a_killed_removal_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "weights").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        saving.rotate(tmp_path, 1)
    monkeypatch.undo()
    saving.clear_aside(tmp_path)
    assert saving.list_checkpoints(tmp_path) == [(2, tmp_path / "checkpoint-2")]


def test_a_folder_taken_aside_goes_back_where_a_kill_left_a_gap(tmp_path: Path) -> None:
    write(tmp_path, 5)
    os.rename(tmp_path / "checkpoint-5", saving.aside_dir(tmp_path) / "old-checkpoint-5")
    saving.clear_aside(tmp_path)
    assert saving.newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-5", [])


@pytest.mark.parametrize("name", ["checkpoint-500", "final"])
def test_another_programs_folders_are_neither_removed_nor_replaced(tmp_path: Path, name: str) -> None:
    write(tmp_path, 9)
    saving.check_nothing_foreign(tmp_path)
    (tmp_path / name).mkdir()
    saving.check_nothing_foreign(tmp_path)  # empty
    (tmp_path / name / "adapter_model.bin").write_text("of another program")
    with pytest.raises(UserError, match=f"{name}: expected a folder that this program wrote.*move it away"):
        saving.check_nothing_foreign(tmp_path)
    saving.rotate(tmp_path, 1)
    assert (tmp_path / name / "adapter_model.bin").exists()


def test_another_experiment_is_refused_with_what_differs(tmp_path: Path) -> None:
    saving.check_same_run(tmp_path, IDENTITY, {})
    write(tmp_path, 3, names={"base_model": "/models/a (aaaa)"})
    saving.check_same_run(tmp_path, IDENTITY, {})
    other = {**IDENTITY, "base_model": "bbbb", "rows_per_update": 64}
    with pytest.raises(UserError) as failure:
        saving.check_same_run(tmp_path, other, {"base_model": "/models/b (bbbb)"})
    text = str(failure.value)
    assert "base model: /models/a (aaaa) there, /models/b (bbbb) now" in text
    assert "rows per update: 32 there, 64 now" in text
    assert "lora_rank" not in text and "to go on with it, or name another --output_dir" in text
    with pytest.raises(UserError, match=r"lora_rank: 64 there, 8 now\nSet .* on with it \(--lora_rank 64\), or name"):
        saving.check_same_run(tmp_path, {**IDENTITY, "lora_rank": 8}, {})
    shutil.move(tmp_path / "checkpoint-3", tmp_path / "final")
    with pytest.raises(UserError, match="final belongs to another experiment"):
        saving.check_same_run(tmp_path, other, {})


def test_disk_is_counted_and_refused_when_short(tmp_path: Path) -> None:
    # 223,150,080 weights, 4 bytes each and 8 of AdamW's state, and 20 MiB
    one = saving.checkpoint_bytes(223_150_080, 4, 8)
    assert one == 2_677_800_960 + 20_971_520
    assert saving.disk_needed(one, 100, limit=1, has_best=False) == 2 * one + 100
    assert saving.disk_needed(one, 100, limit=1, has_best=True) == 3 * one + 100
    assert saving.disk_needed(one, 100, limit=2, has_best=False, existing=2) == one + 100
    assert saving.disk_needed(one, 100, limit=1, has_best=False, existing=3) == one + 100  # written before any goes
    assert saving.disk_needed(0, 100, limit=1, has_best=False) == 100
    free = shutil.disk_usage(tmp_path).free
    saving.check_disk(tmp_path / "not" / "yet", free // 2)
    with pytest.raises(UserError, match="GiB are free"):
        saving.check_disk(tmp_path / "not" / "yet", free * 2)


def test_a_full_disk_is_told_in_sizes_that_mean_something_and_with_the_hidden_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=21 * 2**20))
    with pytest.raises(UserError, match="need 43 MiB, 21 MiB are free") as failure:
        saving.check_disk(tmp_path, 43 * 2**20)
    assert "half-written" not in str(failure.value)
    work = saving.finalizing_dir(tmp_path) / "final"
    work.mkdir(parents=True)
    (work / "weights").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UserError, match="need 2.0 GiB, .*/.finalizing holds 3 MiB half-written"):
        saving.check_disk(tmp_path, 2 * 2**30)
    saving.clear_aside(tmp_path)
    assert work.exists()


def test_main_memory_is_refused_when_short() -> None:
    free = saving.free_host_memory()
    assert 2**26 < free < 2**45
    saving.check_host_memory(free // 4, "saving")
    with pytest.raises(UserError, match="saving needs .* GiB of main memory"):
        saving.check_host_memory(free * 4, "saving")


def test_a_containers_pages_of_files_are_free(tmp_path):
    for name, value in (
        ("max", "4000"),
        ("current", "3500"),
        ("stat", "anon 500\nactive_file 1000\ninactive_file 2000\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(value)
    assert saving._container_limit(tmp_path) == 3500
    (tmp_path / "memory.max").write_text("max")
    assert saving._container_limit(tmp_path) == 2**63


def test_a_containers_limit_bounds_the_machines_free_memory(monkeypatch):
    monkeypatch.setattr(saving, "_container_limit", lambda: 5)
    assert saving.free_host_memory() == 5


def test_a_folder_is_on_the_disk_before_it_is_marked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut at any moment leaves no complete marker beside files that were never written."""
    written, done, rename = tmp_path / ".saving" / "checkpoint-1", [], os.rename
    written.mkdir(parents=True)
    (written / "a.bin").write_bytes(b"x")
    monkeypatch.setattr(saving, "sync", lambda path: done.append(Path(path).name))
    monkeypatch.setattr(os, "rename", lambda path, target: (done.append("renamed"), rename(path, target)))
    saving.publish(written, tmp_path / "checkpoint-1", {})
    assert done == ["a.bin", saving.MARKER, "checkpoint-1", "renamed", tmp_path.name]
