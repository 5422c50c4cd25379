"""MMCU from a hub on a loopback port: an archive with bad names, lock files and all; from a folder; counted."""

import shutil
import sys
import zipfile

import pytest

from finetune.errors import UserError
from llm_code.llm_evaluation import mmcu_download
from llm_code.llm_evaluation.mmcu_data import read_questions
from tests.hub import Hub
from tests.tiny.build_mmcu import OTHERS, SUBJECTS, build_mmcu

COUNTS = {"医疗": sum(SUBJECTS.values()), "法律": 14, "心理": 13, "教育": 17}  # the row without an answer counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small set as a folder."""
    path = tmp_path_factory.mktemp("mmcu") / "MMCU0513"
    build_mmcu(path)
    return path


class WindowsInfo(zipfile.ZipInfo):
    """An entry whose name is stored as Windows stores it: in GBK, without the mark of UTF-8."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 zipfile's own name
        return self.filename.encode("gbk"), self.flag_bits


@pytest.fixture
def archive(folder, tmp_path):
    """A repository with an archive from Windows, and what macOS adds to one."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "README.md").write_text("MMCU")
    with zipfile.ZipFile(repository / "MMCU0513.zip", "w") as target:
        for path in sorted(folder.rglob("*.xlsx")):
            target.writestr(WindowsInfo(path.relative_to(folder.parent).as_posix()), path.read_bytes())
        target.writestr("__MACOSX/MMCU0513/test/._法律.xlsx", b"\0")
    with zipfile.ZipFile(repository / "MMCU0513.zip") as target:
        assert not any("医疗" in name for name in target.namelist()), "the names should be in GBK"
    return repository


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program in this process with the small set's counts; returns its stdout."""
    monkeypatch.setattr(mmcu_download, "QUESTIONS", COUNTS)
    monkeypatch.setattr(mmcu_download, "SUBJECTS", {"医疗": 3, "法律": 1, "心理": 1, "教育": 2})

    def run(data_dir, source="huggingface", dataset_id="Besteasy/MMCU"):
        words = ["--dataset_id", dataset_id, "--revision", "main", "--source", source, "--data_dir", str(data_dir)]
        monkeypatch.setattr(sys, "argv", ["mmcu_download", *words])
        capsys.readouterr()
        mmcu_download.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_an_archive_is_fetched_placed_and_counted(archive, folder, tmp_path, run, monkeypatch, source):
    data_dir = tmp_path / "data"
    with Hub() as hub:
        hub.add("Besteasy/MMCU", "main", archive)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        printed = run(data_dir, source)
        assert "74 questions of 7 subjects" in printed and "CC BY-NC-SA 4.0" in printed
        with pytest.raises(UserError, match="has no dataset other/MMCU"):
            run(tmp_path / "other", source, "other/MMCU")
        seen = len(hub.requests)
        assert run(data_dir, source).startswith("already there")
        assert len(hub.requests) == seen
    names = {path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*") if path.is_file()}
    books = ["医疗", *OTHERS]
    assert names == {"LICENCE.txt", *(f"{part}/{book}.xlsx" for part in ("test", "dev") for book in books)}
    assert read_questions(data_dir) == read_questions(folder)


def test_an_absent_hub_is_named_with_this_steps_key(tmp_path, run, monkeypatch, free_tcp_port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_tcp_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="cannot reach http://127.0.0.1.*or MMCU_SOURCE=modelscope") as failure:
        run(tmp_path / "data")
    assert "make mmcu-download" not in str(failure.value)


def test_a_folder_that_lacks_something_is_named(folder, tmp_path, run):
    copy = tmp_path / "unpacked" / "MMCU0513"
    shutil.copytree(folder, copy)
    assert run(copy.parent).startswith(f"already there: {copy}")
    (copy / "dev" / "法律.xlsx").unlink()
    (copy / "test" / "心理.xlsx").unlink()
    with pytest.raises(UserError, match="心理: expected 13 questions of 1 subjects, found 0 of 0\ndev/法律.xlsx"):
        run(copy.parent)


def test_names_of_archives():
    entry = zipfile.ZipInfo("x")
    entry.filename = "test/医疗.xlsx".encode("gbk").decode("cp437")
    assert mmcu_download.entry_name(entry) == "test/医疗.xlsx"
    entry.filename = "test/医疗.xlsx".encode().decode("cp437")
    assert mmcu_download.entry_name(entry) == "test/医疗.xlsx"
    entry.filename, entry.flag_bits = "test/医疗.xlsx", 0x800
    assert mmcu_download.entry_name(entry) == "test/医疗.xlsx"
