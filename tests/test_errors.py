"""run_main: exit codes and what reaches stderr."""

import errno
import importlib
import os
import subprocess
import sys

import pytest

import finetune
from finetune.errors import FULL_DISK, UserError, run_main
from tests.conftest import REPOSITORY


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "text"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("expected 1, got 2")), 2, "error: expected 1, got 2\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_exit_status_and_message(main, status, text, capsys):
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == status
    assert capsys.readouterr().err == text


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))


WAYS_TO_WRITE = {
    "a text": "Path('rows.csv').write_text('row' * 100_000)",
    "tensors": "save_file({'weight': torch.zeros(100_000)}, 'model.safetensors')",
    "a cause that is hidden": "write_table()",
    "a checkpoint": "torch.save({'weight': torch.zeros(100_000)}, 'optimizer.pt')",
    "a small checkpoint": "torch.save({'weight': torch.zeros(16_000)}, 'rng_state.pth')",
}
WRITER = """
import torch
from pathlib import Path
from safetensors.torch import save_file
from finetune.errors import run_main

def write_table():
    try:
        Path("rows.csv").write_text("row" * 100_000)
    except OSError:
        raise RuntimeError("no table") from None

run_main(lambda: {way})
"""


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
def test_a_full_disk_is_told_in_a_line(way, tmp_path):
    """On a real disk of 64 kB, in a mount namespace of its own."""
    mounted = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && cd {tmp_path} && exec "$@"'
    program = [sys.executable, "-c", WRITER.format(way=WAYS_TO_WRITE[way])]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, "sh", *program]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert (done.returncode, done.stderr) == (2, f"error: {FULL_DISK}\n") and "df -h" in FULL_DISK


PRINTER = """
from finetune.errors import run_main

def main():
    for number in range({lines}):
        print(number)

run_main(main)
"""


@pytest.mark.parametrize("lines", [100, 100_000])  # fewer than the buffer holds, and more
def test_a_reader_that_has_seen_enough_ends_the_program_quietly(lines):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PRINTER.format(lines=lines)]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_stdout_is_no_error():
    command = ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, PRINTER.format(lines=3)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_connection_that_broke_keeps_its_traceback():
    with pytest.raises(BrokenPipeError):
        run_main(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))


def test_other_trouble_with_a_file_keeps_its_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_main(lambda: (tmp_path / "missing").read_text())


def test_a_python_that_is_too_old_is_told_before_anything_else(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    with pytest.raises(SystemExit) as left:
        importlib.reload(finetune)
    assert left.value.code == 2
    assert "error: expected Python 3.10 or newer, found 3.8. Install the environment" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_is_told_in_a_line(number, capsys):
    def main():
        raise OSError(number, "no", "/ro/results")

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: /ro/results: no. Name a folder that can be written.\n"


BROKEN_OFF = """
import os, signal
from finetune.errors import run_main

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        pass  # as C code does while it tries an import
    raise {error}

signal.signal(signal.SIGINT, signal.default_int_handler)
run_main(main)
"""


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        ("ImportError('cannot load module more than once per process')", 130, "interrupted"),
        ("RuntimeError('a bug')", 1, "RuntimeError: a bug"),
    ],
)
def test_an_import_that_ctrl_c_broke_off_is_no_bug(error, status, last):
    command = [sys.executable, "-c", BROKEN_OFF.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, last)
    assert ("Traceback" in done.stderr) == (status == 1)
