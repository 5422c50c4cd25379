"""Look at this machine before anything is paid for: one line a finding, ok, warn or FAIL, and what to do.

    python3 scripts/doctor.py [--net]      # make doctor [NET=1]

Reads `.env` and asks nvidia-smi, /proc and the disks; changes nothing. Exit status 1 when a line says FAIL.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Tuple
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import settings  # noqa: E402
from scripts.environment import MARKER, OLDEST_DRIVER, files_of, is_current, is_for_processor, target_of  # noqa: E402
from scripts.nvidia import Card, cuda_version, find_cards, none_found  # noqa: E402
from scripts.package_install import EnvironmentFailed, choose_manager, find_python  # noqa: E402

# What the steps write below each setting, in GB (10^9 bytes), for Qwen-14B-Chat: its 14.17e9 parameters in 16 bits are
# 28.3 GB, once as downloaded, once converted, once merged; a rank-64 adapter has 0.249e9 parameters, and a checkpoint
# holds them and Adam's two moments in 32 bits (3.0 GB), two at a time while one replaces the other; final/ has 1.0 GB.
DISK_GB = {"BASE_MODEL_DIR": 28.3, "QWEN_MODEL_DIR": 28.3, "QWEN_OUTPUT_DIR": 7.0, "QWEN_MERGED_DIR": 28.3}
# The same for Baichuan2-7B-Chat: 7.51e9 parameters are 15 GB, as downloaded and converted; a checkpoint of full
# training has at most 16 bytes a parameter (120.1 GB; 45 GB without DeepSpeed), two at a time; final/ has 15 GB.
BAICHUAN_DISK_GB = {"BAICHUAN_MODEL_DIR": 30.0, "BAICHUAN_OUTPUT_DIR": 255.2}
# Conversion and merge hold less than this.
MEMORY_GB = 6
USED_AFTER_TRAINING = {"QWEN_OUTPUT_DIR": "QWEN_ADAPTER_DIR", "BAICHUAN_OUTPUT_DIR": "LLM_MODULE_MODEL_PATH"}
Finding = Tuple[str, str, str]  # level, subject, text


def check_settings() -> list[Finding]:
    """The settings, put into the environment for the other checks."""
    try:
        settings.load()
    except settings.SettingsError as error:
        return [("FAIL", "settings", str(error))]
    if not (ROOT / ".env").exists():
        return [("warn", "settings", "no .env yet: cp .env.example .env, and edit it")]
    return [("ok", "settings", ".env is well-formed (make config shows the values)"), *check_pairs()]


def check_pairs() -> list[Finding]:
    """Whether what is evaluated and served is what the training writes: two settings that are easily changed singly."""
    found = []
    for trained, used in USED_AFTER_TRAINING.items():
        folder, model = (os.environ.get(key, "") for key in (trained, used))
        if folder and model and Path(model) != Path(folder) / "final":
            text = f"{used} is {model}, while the training writes {folder}/final ({trained}): is that meant?"
            found.append(("warn", "settings", text))
    return found


def check_cards() -> list[Finding]:
    cards = find_cards()
    if not cards:
        return [("warn", "card", none_found())]
    found = []
    for card in cards:
        gib = card.memory_mib / 1024
        text = f"{card.index}: {card.name}, {gib:.0f} GiB, driver {card.driver}"
        hint = "" if gib >= 40 else f"; the walkthrough has 48 GB: make qwen-plan tells what fits into {gib:.0f} GiB"
        found.append(("warn" if hint else "ok", "card", text + hint))
    found.append(("ok", "driver", f"{cards[0].driver}, CUDA {cuda_version()}"))
    if int(cards[0].driver.split(".")[0]) < OLDEST_DRIVER and not os.environ.get("TORCH_INDEX_URL"):
        text = f"{cards[0].driver} is older than {OLDEST_DRIVER}: set TORCH_INDEX_URL to PyTorch's cu126 wheel index"
        found.append(("FAIL", "driver", text))
    if is_for_processor():
        text = "TORCH_INDEX_URL names wheels for the processor, which do not see the card: empty it, then make the"
        found.append(("FAIL", "torch", f"{text} environments again"))
    return found


def check_memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> list[Finding]:
    """Memory of the machine, or of the container where that is less."""
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    total = int(fields["MemTotal"].split()[0]) * 1024
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    level, hint = ("ok", "") if total > MEMORY_GB * 1e9 else ("warn", f"; converting a 14B model takes {MEMORY_GB} GB")
    return [(level, "memory", f"{total / 1e9:.0f} GB{hint}")]


def check_disks() -> list[Finding]:
    """Free space of every disk the settings name, against what the steps still have to write there."""
    too_little = "FAIL" if os.environ.get("QWEN_MODEL_ID", "").endswith("Qwen-14B-Chat") else "warn"
    found = _check_disks(DISK_GB, "Qwen-14B-Chat", too_little)
    return found + _check_disks(BAICHUAN_DISK_GB, "project 2, Baichuan2-7B-Chat,", "warn")


def _check_disks(sizes: dict[str, float], what: str, too_little: str) -> list[Finding]:
    wanted: dict[int, tuple[Path, list[str]]] = {}
    for key in sizes:
        if os.environ.get(key):
            place = _existing_parent(Path(os.environ[key]))
            wanted.setdefault(place.stat().st_dev, (place, []))[1].append(key)
    found = []
    for place, keys in wanted.values():
        need = sum(_missing_gb(key, sizes[key]) for key in keys)
        free = shutil.disk_usage(place).free / 1e9
        text = f"{place}: {free:.0f} GB free, {what} takes {need:.0f} GB more ({', '.join(keys)})"
        if free < need and "BASE_MODEL_DIR" in keys:
            text += ". KEEP_ORIGINAL=0 saves one copy of the model"
        found.append(("ok" if free >= need else too_little, "disk", text))
    return found


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.absolute().parent)


def _missing_gb(key: str, size: float) -> float:
    """What is still to be written: of a download that was cut the rest, of another place all or nothing."""
    folder = Path(os.environ[key])
    if key != "BASE_MODEL_DIR":
        return 0 if _has_files(folder) else size
    model = folder / os.environ.get("QWEN_MODEL_ID", "")  # other models may lie beside it
    return max(0, size - sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) / 1e9)


def _has_files(folder: Path) -> bool:
    """Whether weights lie in the folder or below it (in a checkpoint)."""
    return any(folder.glob("**/*.safetensors")) or any(folder.glob("**/*.bin"))


def check_python() -> list[Finding]:
    """What makes the environments, and which of them are there."""
    try:
        kind, program = choose_manager()
    except EnvironmentFailed as error:
        return [("FAIL", "python", str(error))]
    python = find_python()
    usable = python or kind != "venv"
    text = f"environments are made with {kind} ({program if kind != 'venv' else python})"
    found = [
        ("ok", "python", text) if usable else ("FAIL", "python", "no Python 3.11 to 3.13 with venv, no conda, no uv")
    ]
    cards = find_cards()
    return found + [_check_environment(name, cards) for name in ("modelscope_env", "qwen_env", "llm_env")]


def _check_environment(name: str, cards: list[Card]) -> Finding:
    """Whether an environment is there, and what this machine needs now: it may have had no card when it was made."""
    folder = Path(os.environ.get("ENVS_DIR", "")) / name
    if not os.environ.get("ENVS_DIR") or not (folder / MARKER).exists():
        return "warn", name, f"not there yet: make {target_of(name)}"
    if not is_current(folder, files_of(name, cards)):
        return "warn", name, f"{folder} has other packages than wanted here now: make {target_of(name)}"
    return "ok", name, str(folder)


def check_net() -> list[Finding]:
    """Whether the hub answers on its port."""
    is_modelscope = os.environ.get("SOURCE", "modelscope") == "modelscope"
    key, public = ("MODELSCOPE_ENDPOINT", "modelscope.cn") if is_modelscope else ("HF_ENDPOINT", "huggingface.co")
    url = urlparse(os.environ.get(key) or f"https://{public}")
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError as error:
        return [
            ("FAIL", "net", f"{url.netloc} does not answer ({error}). Another hub or mirror: SOURCE, {key} in .env")
        ]
    return [("ok", "net", f"{url.netloc} answers")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="store_true", help="also try to reach the hub that SOURCE names")
    arguments = parser.parse_args()
    checks = [check_settings, check_cards, check_memory, check_disks, check_python]
    findings = []
    for check in [*checks, check_net] if arguments.net else checks:
        try:
            findings += check()
        except OSError as error:  # a place this user may not even look into
            findings.append(("FAIL", check.__name__.removeprefix("check_"), settings.advice_on(error)))
    for level, subject, text in findings:
        print(f"{level:<5} {subject:<15} {text}")
    return 1 if any(level == "FAIL" for level, _, _ in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
