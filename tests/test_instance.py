"""The preparation of a rented box, and that repeating it changes nothing."""

import os

import pytest

from scripts import instance


def test_directories_are_created_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL_DIR", str(tmp_path / "a" / "base_model"))
    monkeypatch.setenv("ENVS_DIR", str(tmp_path))
    monkeypatch.delenv("QWEN_OUTPUT_DIR", raising=False)
    report = instance.make_directories()
    assert report[0] == f"{tmp_path}/a/base_model created" and (tmp_path / "a" / "base_model").is_dir()
    assert report[1] == f"{tmp_path} was there"
    assert report[2].startswith("QWEN_OUTPUT_DIR has no value")
    assert instance.make_directories()[0] == f"{tmp_path}/a/base_model was there"


def test_the_encodings_are_appended_once_and_completed(tmp_path):
    vimrc = tmp_path / "vimrc"
    vimrc.write_text("syntax on\nset encoding=utf-8\n")
    assert instance.set_vim_encodings(vimrc).endswith("encodings appended")
    first = vimrc.read_text()
    lines = first.splitlines()
    assert lines[:2] == ["syntax on", "set encoding=utf-8"]
    for line in instance.VIM_LINES:
        assert lines.count(line) == 1
    assert instance.set_vim_encodings(vimrc).endswith("had the encodings")
    assert vimrc.read_text() == first
    assert instance.set_vim_encodings(tmp_path / "new").endswith("encodings appended")


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A pretended apt-get alone on PATH, on a machine without ifconfig; returns its list of calls."""
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls; exit ${{APT_STATUS:-0}}\n')
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(instance, "SYSTEM_PROGRAMS", [])
    return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def test_net_tools_are_installed_where_ifconfig_is_missing(tmp_path, monkeypatch, apt):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert instance.install_net_tools() == "net-tools installed"
    assert apt() == ["update", "install -y net-tools"]
    (tmp_path / "ifconfig").write_text("#!/bin/sh\n")
    (tmp_path / "ifconfig").chmod(0o755)
    assert instance.install_net_tools() == "net-tools was there"
    assert len(apt()) == 2


def test_a_failing_or_forbidden_installation_says_what_to_do(monkeypatch, apt):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # and there is no sudo
    assert "As root: apt-get update && apt-get install net-tools" in instance.install_net_tools()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("APT_STATUS", "100")
    assert "could not be installed" in instance.install_net_tools()


def test_make_instance_says_what_it_did_and_the_second_time_that_all_was_there(checkout, make, tmp_path):
    (tmp_path / "ifconfig").write_text("#!/bin/sh\n")
    (tmp_path / "ifconfig").chmod(0o755)
    places = {key: str(tmp_path / key) for key in ("BASE_MODEL_DIR", "ENVS_DIR", "QWEN_OUTPUT_DIR")}
    lines = "".join(f"{key}={value}\n" for key, value in places.items())
    (checkout / ".env").write_text(lines)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    first = make("instance", f"ARGS=--vimrc {tmp_path}/vimrc", environment=variables)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("created") == 3 and "encodings appended" in first.stdout
    second = make("instance", f"ARGS=--vimrc {tmp_path}/vimrc", environment=variables)
    assert second.stdout.count("was there") == 4 and "had the encodings" in second.stdout


@pytest.mark.parametrize("broken", ["ENVS_DIR", "--vimrc"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, broken):
    (tmp_path / "ifconfig").write_text("#!/bin/sh\n")
    (tmp_path / "ifconfig").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "file").touch()
    for key in instance.DIRECTORIES:
        monkeypatch.setenv(key, str(tmp_path / ("file/x" if key == broken else key)))
    vimrc = tmp_path / ("file/vimrc" if broken == "--vimrc" else "vimrc")
    monkeypatch.setattr(instance.settings, "load", lambda: None)  # it would leave its values to the other tests
    monkeypatch.setattr(instance.sys, "argv", ["instance.py", "--vimrc", str(vimrc)])
    assert instance.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/file") and "Not a directory" in error
    assert ("Set ENVS_DIR in .env to a folder you may use" in error) == (broken == "ENVS_DIR")
