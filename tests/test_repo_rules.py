"""Promises about the repository as a whole: who imports whom, which settings exist, what answers --help."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.environment import pins
from scripts.settings import read_example
from tests.conftest import NOT_COPIED, REPOSITORY

ROOMS = {"scripts": set(), "finetune": {"finetune"}, "qwen_qlora": {"finetune"}, "llm_code": {"finetune"}}
# Words for one run, not settings of the machine: make qwen-train BG=1.
ARGUMENTS = set("ARGS BG DRY_RUN FILE FOLLOW GPU GPUS LIMIT NET QUESTION STEP TIMEOUT".split())
# What make and bash define, and what other programs read.
NOT_OURS = set(
    "SHELL MAKEFLAGS MAKECMDGOALS MAKEFILE_LIST SETTINGS WITHOUT_SETTINGS BASH_SOURCE PATH CI DEBIAN_FRONTEND "
    "UV_DEFAULT_INDEX VLLM_API_KEY RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DS_ACCELERATOR "
    "PYTORCH_ALLOC_CONF OMP_NUM_THREADS OMP_WAIT_POLICY HF_HUB_DISABLE_XET LOCAL_SIZE HOME MAX_JOBS "
    "TORCH_EXTENSIONS_DIR".split()
)
# Settings that libraries read from the environment by themselves.
READ_BY_LIBRARIES = set("HF_ENDPOINT HF_TOKEN MODELSCOPE_ENDPOINT MODELSCOPE_API_TOKEN".split())


def files(*patterns: str, below: str = ".") -> list[Path]:
    found = [path for pattern in patterns for path in (REPOSITORY / below).rglob(pattern)]
    return [path for path in found if not NOT_COPIED.intersection(path.relative_to(REPOSITORY).parts)]


def imports_of(path: Path) -> set[str]:
    """The first names of the modules a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    """scripts imports nothing of ours, finetune knows no project, the projects never import each other."""
    allowed = ROOMS[room] | {room}
    for path in files("*.py", below=room) if (REPOSITORY / room).exists() else []:
        for name in imports_of(path):
            first = name.split(".")[0]
            if first in ROOMS and first not in allowed:
                assert room != "scripts" and name == "scripts.settings", f"{path} imports {name}"


def test_scripts_need_only_the_standard_library_at_import():
    """They run on the box's own python3."""
    for path in files("*.py", below="scripts"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names | {"scripts"}, f"{path} imports {name}"


def used_settings() -> dict[str, set[str]]:
    """Upper-case names the Makefile, the shells and the Python files read from the environment, with their places."""
    found: dict[str, set[str]] = {}
    python = r"""(?:environ\.get\(|getenv\(|environ\[)\s*["']([A-Z][A-Z0-9_]+)["'](?!\]\s*=[^=])"""
    patterns = {"Makefile": r"\$\$?[({]?([A-Z][A-Z0-9_]+)\b", "*.sh": r"\$\{?([A-Z][A-Z0-9_]+)\b", "*.py": python}
    for pattern, expression in patterns.items():
        for path in files(pattern):
            if "tests" not in path.relative_to(REPOSITORY).parts:
                for key in re.findall(expression, path.read_text(encoding="utf-8")):
                    found.setdefault(key, set()).add(path.name)
    return found


def test_the_settings_used_are_the_settings_in_the_example():
    used, listed = used_settings(), set(read_example())
    unlisted = {key: places for key, places in used.items() if key not in listed | ARGUMENTS | NOT_OURS}
    assert not unlisted, "used but not in .env.example"
    assert not listed - set(used) - READ_BY_LIBRARIES, "in .env.example but not used"


def test_every_json_file_parses():
    paths = files("*.json", "*.jsonl")
    assert paths
    for path in paths:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line)


def entry_points() -> list[str]:
    """Every file that is a program: path from the repository."""
    rooms = [room for room in ROOMS if (REPOSITORY / room).exists()]
    paths = [path for room in rooms for path in files("*.py", below=room)]
    programs = [path for path in paths if re.search(r"^if __name__ == ", path.read_text(), re.MULTILINE)]
    programs += [path for room in rooms for path in files("__main__.py", below=room) if path not in programs]
    return sorted(str(path.relative_to(REPOSITORY)) for path in programs)


@pytest.mark.parametrize("path", entry_points())
def test_every_program_answers_help(path):
    module = path.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    command = [path] if path.startswith("scripts/") else ["-m", module]
    done = subprocess.run([sys.executable, *command, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout or f"python -m {module} " in done.stdout


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_target_and_both_set_up_commands_are_in_both_readmes(readme):
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    missing = [target for target in targets if not re.search(rf"make {target}\b(?!-)", text)]
    assert not missing
    first_block = text.split("```")[1]
    assert re.findall(r"^make .*$", first_block, re.MULTILINE)[0].split()[:2] == ["make", "quickstart"]
    assert "make test" in first_block


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_path_in_the_readmes_exists(readme):
    """File trees and links grow stale; paths of ours start with a room's name or are in the list of rooms."""
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    rooms = "|".join([*ROOMS, "env", "tests"])
    named = set(re.findall(rf"(?:{rooms})/[\w./-]*[\w/]", text)) | set(re.findall(r"\]\(([^):#]+)\)", text))
    written = {read_example()[key] for key in ("QWEN_RESULT_FILE", "QWEN_BASE_RESULT_FILE")}
    missing = [name for name in named - written if not (REPOSITORY / name).exists()]
    assert not missing


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_passes():
    shells = [*files("*.sh"), REPOSITORY / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *map(str, shells)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_shell_stops_at_the_first_error():
    for path in [*files("*.sh"), REPOSITORY / ".ci" / "run"]:
        lines = path.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines, path


def test_every_package_that_is_imported_is_a_pinned_requirement():
    """Also those that would come along with another one: its next version may drop them."""
    distributions = importlib.metadata.packages_distributions()
    pinned = {normal(name) for file in (REPOSITORY / "env").glob("*_requirements.txt") for name in pins([file])}
    for path in [path for room in ROOMS if (REPOSITORY / room).exists() for path in files("*.py", below=room)]:
        for name in (
            # triton's version is torch's own choice
            {name.split(".")[0] for name in imports_of(path)}
            - sys.stdlib_module_names
            - set(ROOMS)
            - {"tests", "triton"}
        ):
            wanted = {normal(distribution) for distribution in distributions.get(name, [name])}
            assert wanted & pinned, f"{path} imports {name}"


def normal(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub("[-_.]+", "-", name).lower()
