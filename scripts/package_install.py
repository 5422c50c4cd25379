"""How an environment is created and filled: conda, uv or venv for the interpreter, pip for torch, uv for the rest."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# The versions that every pinned requirement exists for; env/lock.txt was tested with the first.
PYTHONS = ["3.11", "3.12", "3.13"]


class EnvironmentFailed(ValueError):
    """An environment that cannot be made; the text says what is missing and what to do."""


def choose_manager() -> tuple[str, str]:
    """What ENV_MANAGER asks for, as (kind, program); auto takes the first of conda, uv, venv that is here."""
    asked = os.environ.get("ENV_MANAGER") or "auto"
    if asked not in ("auto", "conda", "uv", "venv"):
        raise EnvironmentFailed(f"ENV_MANAGER must be auto, conda, uv or venv, got: {asked}")
    programs = {"conda": shutil.which("conda") or shutil.which("mamba"), "uv": shutil.which("uv"), "venv": "venv"}
    for kind, program in programs.items():
        if program and asked in ("auto", kind):
            return kind, program
    raise EnvironmentFailed(f"ENV_MANAGER={asked}, but {asked} is not on PATH. Install it, or set ENV_MANAGER=auto")


def find_python() -> str | None:
    """A Python of a supported version that can make environments; asked to run, since a shim may stand for none."""
    test = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for name in [sys.executable, *(f"python{version}" for version in PYTHONS), "python3"]:
        program = shutil.which(name)
        if program:
            answer = subprocess.run([program, "-c", test], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            if answer.returncode == 0 and answer.stdout.decode().strip() in PYTHONS:
                return program
    return None


def create(name: str, folder: Path, conda_file: Path) -> None:
    """Make the interpreter of an environment. An attempt that was interrupted is continued in its folder.

    Raises EnvironmentFailed when the machine has nothing to make it with.
    """
    kind, program = choose_manager()
    if kind == "conda":
        action = "update" if (folder / "conda-meta").exists() else "create"
        run([program, "env", action, "--prefix", str(folder), "--file", str(conda_file)])
        return
    python = find_python()
    if kind == "uv":
        run([program, "venv", "--seed", "--allow-existing", "--python", python or PYTHONS[0], str(folder)])
        return
    if python is None:
        raise EnvironmentFailed(
            f"{name} needs Python {PYTHONS[0]} to {PYTHONS[-1]} with its venv module, and neither python3 "
            f"({sys.version.split()[0]}) nor python{PYTHONS[0]} on PATH is one. Install one (Debian, Ubuntu: apt-get "
            f"install python{PYTHONS[0]} python{PYTHONS[0]}-venv), or conda or uv, which bring their own."
        )
    run([python, "-m", "venv", str(folder)])


def install(folder: Path, torch: str, files: list[Path], lock: Path) -> None:
    """Fill an environment: torch by pip, with TORCH_INDEX_URL besides the package index, then the files by uv."""
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--constraint", str(lock)]
    wheels = os.environ.get("TORCH_INDEX_URL")
    run([*pip, torch, *(["--extra-index-url", wheels] if wheels else [])])
    uv = shutil.which("uv")
    if uv is None:
        run([*pip, "uv"])
        uv = str(folder / "bin" / "uv")
    requirements = [argument for file in files for argument in ("--requirement", str(file))]
    index = package_index(python)
    variables = {"UV_DEFAULT_INDEX": index} if index else {}
    # Compiled now, once: a process that may not write bytecode would compile every package at every start.
    compiled = [uv, "pip", "install", "--compile-bytecode", "--python", python]
    run([*compiled, "--constraint", str(lock), *requirements], variables)


def package_index(python: str) -> str:
    """The index pip would use, since uv reads neither PIP_INDEX_URL nor pip.conf; empty for the default."""
    if os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX"):
        return os.environ.get("PIP_INDEX_URL") or os.environ["UV_DEFAULT_INDEX"]
    answer = subprocess.run(
        [python, "-m", "pip", "config", "get", "global.index-url"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return answer.stdout.decode().strip()


def run(command: list[str], variables: dict[str, str] | None = None) -> None:
    """Print a command and run it; raises EnvironmentFailed with its status."""
    print(f"-----> {' '.join(map(shlex.quote, command))}", file=sys.stderr, flush=True)
    status = subprocess.run(command, env={**os.environ, **(variables or {})}).returncode
    if status:
        raise EnvironmentFailed(
            f"{Path(command[0]).name} ended with status {status} (its words are above). The network or the index? "
            "PIP_INDEX_URL and TORCH_INDEX_URL in .env name mirrors. The same command continues."
        )
