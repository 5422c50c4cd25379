"""Create a Python environment from the pinned requirements in env/, or bring it up to date.

    python3 scripts/environment.py modelscope_env      # make modelscope-env
    python3 scripts/environment.py qwen_env            # make qwen-env
    python3 scripts/environment.py llm_env             # make baichuan-env
    python3 scripts/environment.py .venv               # what make quickstart and make test use

Writes ENVS_DIR/NAME, or .venv in the repository. torch comes first and by pip, so that TORCH_INDEX_URL and pip's own
settings decide which wheel it is; uv installs the rest, with the versions of env/lock.txt. The marker that a finished
environment carries is written last: an interrupted installation continues, changed requirements are installed anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import settings  # noqa: E402
from scripts.nvidia import Card, find_cards  # noqa: E402
from scripts.package_install import EnvironmentFailed, create, install  # noqa: E402

REQUIREMENTS = {
    "modelscope_env": ["modelscope_requirements.txt"],
    "qwen_env": ["qwen_requirements.txt", "gpu_requirements.txt"],
    "llm_env": ["llm_requirements.txt", "gpu_requirements.txt"],
    ".venv": ["test_requirements.txt", "gpu_requirements.txt"],
}
LOCK = ROOT / "env" / "lock.txt"
MARKER = "requirements.sha256"  # in a finished environment: what it was made of
# torch 2.13 in the package index is built for CUDA 13 (https://github.com/pytorch/pytorch/issues/178665), which needs
# this driver (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/).
OLDEST_DRIVER = 580
# Run in the new environment: every pinned package is there in its version, and those that load native code import.
CHECK = """
import importlib, importlib.metadata, sys
for pin in sys.argv[1:]:
    name, version = pin.split("==")
    found = importlib.metadata.version(name).split("+")[0]
    if found != version:
        sys.exit(f"{name} should be {version}, found {found}")
    if name in ("torch", "transformers", "peft", "bitsandbytes", "modelscope"):
        importlib.import_module(name)
"""


def ensure(name: str) -> Path:
    """Create or complete an environment and return its folder; a finished one is left as it is.

    Raises EnvironmentFailed when it cannot be made.
    """
    folder, cards = folder_of(name), find_cards()
    files, unfinished = files_of(name, cards), unfinished_mark(folder)
    if is_current(folder, files):
        print(f"{name}: already done, {folder}", file=sys.stderr)
        return folder
    check_driver(name, cards)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    if not has_pip(folder):
        create(name, folder, files[0].with_name(files[0].name.replace("requirements.txt", "env.yml")))
    install(folder, f"torch=={pins(files)['torch']}", files, LOCK)
    verify(folder, files)
    (folder / MARKER).write_text(fingerprint_of(files))
    unfinished.unlink()
    print(f"{name}: done, {folder}", file=sys.stderr)
    return folder


def files_of(name: str, cards: list[Card]) -> list[Path]:
    """The lists of what an environment needs: for a card too, unless it is for the processor alone.

    Boxes are rented without a card for a while, where installing and downloading cost little, and get one later.
    """
    has_card = cards or not (name == ".venv" or is_for_processor())
    return [ROOT / "env" / file for file in REQUIREMENTS[name] if has_card or not file.startswith("gpu")]


def is_for_processor() -> bool:
    """Whether torch comes from wheels that see no card."""
    return os.environ.get("TORCH_INDEX_URL", "").rstrip("/").endswith("/cpu")


def is_current(folder: Path, files: list[Path]) -> bool:
    """Whether an environment is complete and of these very requirements."""
    marker = folder / MARKER
    return marker.exists() and marker.read_text() == fingerprint_of(files) and not unfinished_mark(folder).exists()


def target_of(name: str) -> str:
    """The target of make that creates an environment."""
    return {"llm_env": "baichuan-env", ".venv": "quickstart"}.get(name, name.replace("_", "-"))


def folder_of(name: str) -> Path:
    if name == ".venv":
        return ROOT / ".venv"
    if not os.environ.get("ENVS_DIR"):
        raise EnvironmentFailed(f"{name} needs ENVS_DIR. Set it in .env (cp .env.example .env)")
    return Path(os.environ["ENVS_DIR"]).absolute() / name


def unfinished_mark(folder: Path) -> Path:
    """The file beside an environment that says it is being made; run_step refuses steps while it is there."""
    return folder.with_name(folder.name + ".unfinished")


def pins(files: list[Path]) -> dict[str, str]:
    """Package -> version of every `==` line, following `-r`."""
    found: dict[str, str] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("-r "):
                found.update(pins([file.parent / line[3:].strip()]))
            elif "==" in line:
                package, version = line.split("==")
                found[package] = version
    return found


def fingerprint_of(files: list[Path]) -> str:
    """Changes when a requirement, the lock or the place torch comes from does."""
    text = repr((sorted(pins(files).items()), LOCK.read_text(encoding="utf-8"), os.environ.get("TORCH_INDEX_URL", "")))
    return hashlib.sha256(text.encode()).hexdigest()


def check_driver(name: str, cards: list[Card]) -> None:
    """Refuse an environment whose torch could not see the card; .venv may run on the processor."""
    if os.environ.get("TORCH_INDEX_URL"):
        return
    if not cards:
        print(
            "No NVIDIA card here, so the driver cannot be checked: torch's default wheel (CUDA 13) needs "
            f"{OLDEST_DRIVER}. Once there is a card, make doctor looks. For a machine that never gets one, a smaller "
            "wheel: set TORCH_INDEX_URL to PyTorch's wheel index for cpu (it ends in /whl/cpu).",
            file=sys.stderr,
        )
    elif int(cards[0].driver.split(".")[0]) < OLDEST_DRIVER:
        text = (
            f"the driver {cards[0].driver} is older than {OLDEST_DRIVER}, which torch's default wheel (CUDA 13) needs: "
            "it would not see the card. Set TORCH_INDEX_URL to PyTorch's wheel index for CUDA 12.6 (it ends in "
            "/whl/cu126), or choose a box with a newer driver."
        )
        if name != ".venv":
            raise EnvironmentFailed(text)
        print(f"Note: {text}", file=sys.stderr)


def has_pip(folder: Path) -> bool:
    python = folder / "bin" / "python"
    return python.exists() and subprocess.run([python, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0


def verify(folder: Path, files: list[Path]) -> None:
    wanted = [f"{package}=={version}" for package, version in pins(files).items()]
    if subprocess.run([folder / "bin" / "python", "-c", CHECK, *wanted]).returncode:
        raise EnvironmentFailed(f"{folder} was installed but does not work (see above). Remove it and run this again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=REQUIREMENTS)
    name = parser.parse_args().name
    try:
        settings.load()
        ensure(name)
    except (EnvironmentFailed, settings.SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {settings.advice_on(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
