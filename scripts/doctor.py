"""Look at this machine before anything is paid for: one line a finding, ok, warn or FAIL, and what to do.

    python3 scripts/doctor.py [--net]      # make doctor [NET=1]

Reads `.env` and asks nvidia-smi, /proc and the disks; changes nothing. Exit status 1 when a line says FAIL.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Tuple
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import settings  # noqa: E402
from scripts.environment import MARKER, OLDEST_DRIVER, files_of, is_current, is_for_processor, target_of  # noqa: E402
from scripts.nvidia import Card, cuda_version, find_cards, none_found  # noqa: E402
from scripts.package_install import EnvironmentFailed, choose_manager, find_python  # noqa: E402


@dataclass(frozen=True)
class Project:
    """What one project writes, in GB (10^9 bytes)."""

    what: str
    model_id: str  # the settings that name the base model on the hub, and the place of its converted form
    model_dir: str
    model_gb: float  # as downloaded, and again as converted
    largest_file_gb: float  # of the download
    outputs_gb: dict[str, float]  # by setting: what training and merge write
    environments: tuple[str, ...]
    deepspeed_gb: float = 0  # of outputs_gb, what DEEPSPEED_STAGE=none spares


class Need(NamedTuple):
    """GB still to be written at one place: what stays, what is removed before the training, what that and merge add."""

    stays: float = 0
    passes: float = 0
    later: float = 0


# Qwen-14B-Chat: its 14.17e9 parameters in 16 bits are 28.3 GB (in 15 files of about 2 GB), once as downloaded, once
# converted, once merged; a rank-64 adapter has 0.249e9 parameters, and a checkpoint holds them and Adam's two moments
# in 32 bits (3.0 GB), two at a time while one replaces the other; final/ has 1.0 GB.
QWEN = Project(
    "Qwen-14B-Chat",
    "QWEN_MODEL_ID",
    "QWEN_MODEL_DIR",
    28.3,
    2.1,
    {"QWEN_OUTPUT_DIR": 7.0, "QWEN_MERGED_DIR": 28.3},
    ("modelscope_env", "qwen_env"),
)
# Baichuan2-7B-Chat: 7.51e9 parameters are 15 GB (counted as one file), as downloaded and converted; a checkpoint of
# full training has at most 16 bytes a parameter (120.1 GB; 45 GB without DeepSpeed), two at a time; final/ has 15 GB.
BAICHUAN = Project(
    "project 2, Baichuan2-7B-Chat,",
    "BAICHUAN_MODEL_ID",
    "BAICHUAN_MODEL_DIR",
    15.0,
    15.0,
    {"BAICHUAN_OUTPUT_DIR": 255.2},
    ("modelscope_env", "llm_env"),
    150.2,
)
# One environment: torch 2.13 with CUDA's libraries and triton is 4.8 GB once installed, without them 0.8; all the other
# packages of env/lock.txt together are 1.4 (measured with du).
ENVIRONMENT_GB, PROCESSOR_ENVIRONMENT_GB = 6.0, 2.2
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
    found += check_visible_cards(cards) + check_baichuan_cards(cards)
    found.append(("ok", "driver", f"{cards[0].driver}, CUDA {cuda_version()}"))
    if int(cards[0].driver.split(".")[0]) < OLDEST_DRIVER and not os.environ.get("TORCH_INDEX_URL"):
        text = f"{cards[0].driver} is older than {OLDEST_DRIVER}: set TORCH_INDEX_URL to PyTorch's wheel index for"
        found.append(("FAIL", "driver", f"{text} CUDA 12.6 (its address ends in /whl/cu126)"))
    if is_for_processor():
        text = "TORCH_INDEX_URL names wheels for the processor, which do not see the card: empty it, then make the"
        found.append(("FAIL", "torch", f"{text} environments again"))
    return found


def check_visible_cards(cards: list[Card]) -> list[Finding]:
    """Whether CUDA_VISIBLE_DEVICES names cards that are here, and leaves none of those paid for unused."""
    key = "CUDA_VISIBLE_DEVICES"
    named = _numbers_in(key)
    if named is None:
        return []
    text = _absent_cards(key, named, cards)
    if text:
        return [("FAIL", "card", text)]
    unused = [card for card in cards if card.index not in named]
    if not unused:
        return []
    text = f"{key}={os.environ[key]} leaves {len(unused)} of {len(cards)} cards unused by qwen-train"
    return [("warn", "card", f"{text}: to use all of them, leave it empty in .env ({key}=)")]


def check_baichuan_cards(cards: list[Card]) -> list[Finding]:
    """Whether BAICHUAN_GPUS names cards that are here, unless HOSTFILE takes its place.

    A warning: its default is two cards, and project 1 runs on one.
    """
    named = None if os.environ.get("HOSTFILE") else _numbers_in("BAICHUAN_GPUS")
    text = _absent_cards("BAICHUAN_GPUS", named, cards) if named else ""
    return [("warn", "card", text)] if text else []


def _numbers_in(key: str) -> list[int] | None:
    """The cards a setting names, none for -1; None where it is empty or names them by something else (GPU-8f2c...)."""
    names = [name for name in os.environ.get(key, "").split(",") if name]
    if names == ["-1"]:
        return []
    return [int(name) for name in names] if names and all(name.isdecimal() for name in names) else None


def _absent_cards(key: str, named: list[int], cards: list[Card]) -> str:
    """Which of the named cards this machine has not, and what to set instead; empty when it has all."""
    here = [card.index for card in cards]
    absent = [number for number in named if number not in here]
    if not absent:
        return ""
    instead = ",".join(str(number) for number in here if number in named or not set(named) & set(here))
    text = f"{key}={os.environ[key]} names {_cards(absent)}, this machine has {_cards(here)}"
    return f"{text}: set {key}={instead}"


def _cards(numbers: list[int]) -> str:
    return f"card{'s' if len(numbers) > 1 else ''} {', '.join(str(number) for number in numbers)}"


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
    return _check_disks(QWEN, too_little) + _check_disks(BAICHUAN, "warn")


def _check_disks(project: Project, too_little: str) -> list[Finding]:
    keeps = os.environ.get("KEEP_ORIGINAL") != "0"
    needs, without_original = _needs(project, keeps), _needs(project, False)
    disks: dict[int, tuple[Path, list[str]]] = {}
    for key in needs:
        place = _existing_parent(Path(os.environ[key]))
        disks.setdefault(place.stat().st_dev, (place, []))[1].append(key)
    found = []
    for place, keys in disks.values():
        need, least = (_highest([each[key] for key in keys]) for each in (needs, without_original))
        free = shutil.disk_usage(place).free / 1e9
        text = f"{place}: {free:.0f} GB free, {project.what} takes {need:.0f} GB more ({', '.join(keys)})"
        if free < need and least < need:
            text += f". KEEP_ORIGINAL=0 takes {need - least:.0f} GB less"
        if free < need and _spared(project) and any(needs[key].later for key in project.outputs_gb if key in keys):
            text += f". DEEPSPEED_STAGE=none takes {project.deepspeed_gb:.0f} GB less"
        found.append(("ok" if free >= need else too_little, "disk", text))
    return found


def _spared(project: Project) -> float:
    """GB that training without DeepSpeed would spare, 0 where that is set already."""
    return 0 if os.environ.get("DEEPSPEED_STAGE") == "none" else project.deepspeed_gb


def _highest(needs: list[Need]) -> float:
    """GB of one disk at its fullest: what passes is gone before the training and the merge write theirs."""
    stays, passes, later = (sum(amounts) for amounts in zip(*needs))
    return stays + max(passes, later)


def _needs(project: Project, keeps: bool) -> dict[str, Need]:
    """What is still to be written, by the setting that names the place; settings without a value are left out."""
    original, converted = _model_needs(project, keeps)
    needs = {"BASE_MODEL_DIR": original, project.model_dir: converted}
    for key, size in project.outputs_gb.items():
        size -= project.deepspeed_gb - _spared(project)
        needs[key] = Need(later=0 if _has_files(_place(key)) else size)
    needs["ENVS_DIR"] = Need(stays=sum(_environment_gb(name) for name in project.environments))
    return {key: need for key, need in needs.items() if os.environ.get(key)}


def _model_needs(project: Project, keeps: bool) -> tuple[Need, Need]:
    """What download and conversion still write: of the original, of the converted model.

    KEEP_ORIGINAL=0 (keeps is False) removes each file of the original once it is converted. On one disk both together
    are then never more than the model and its largest file; what lies in either folder is already paid for.
    """
    original, converted = _place("BASE_MODEL_DIR"), _place(project.model_dir)
    if _has_files(converted):  # qwen-download and baichuan-download ask for nothing more, with or without the original
        return Need(), Need()
    model_id = os.environ.get(project.model_id)  # other models may lie beside it
    there = _gb_in(original / model_id) if original and model_id else 0
    begun = _gb_in(converted.with_name(converted.name + ".partial")) if converted else 0
    size = project.model_gb
    if keeps:
        return Need(stays=max(0, size - there)), Need(stays=max(0, size - begun))
    if original and converted and _disk_of(original) == _disk_of(converted):
        return Need(passes=project.largest_file_gb), Need(stays=max(0, size - there - begun))
    return Need(passes=max(0, size - there - begun)), Need(stays=max(0, size - begun))


def _environment_gb(name: str) -> float:
    """What installing an environment still writes: nothing once it is finished."""
    envs = _place("ENVS_DIR")
    if not envs or (envs / name / MARKER).exists():
        return 0
    return max(0, (PROCESSOR_ENVIRONMENT_GB if is_for_processor() else ENVIRONMENT_GB) - _gb_in(envs / name))


def _place(key: str) -> Path | None:
    return Path(os.environ[key]) if os.environ.get(key) else None


def _disk_of(path: Path) -> int:
    return _existing_parent(path).stat().st_dev


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.absolute().parent)


def _gb_in(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def _has_files(folder: Path | None) -> bool:
    """Whether weights lie in the folder or below it (in a checkpoint)."""
    return folder is not None and (any(folder.glob("**/*.safetensors")) or any(folder.glob("**/*.bin")))


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
    if cards and name != "modelscope_env" and (torch := _blind_torch(folder)):
        text = f"torch {torch} in {folder} does not see the card: is it for this driver? Where torch comes from says"
        return "FAIL", name, f"{text} TORCH_INDEX_URL; once that is right: make {target_of(name)}"
    return "ok", name, str(folder)


def _blind_torch(folder: Path) -> str:
    """The version of an environment's torch if it sees no card; empty if it does, or cannot be asked."""
    program = "import torch; print(torch.cuda.is_available(), torch.__version__)"
    variables = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    command = [str(folder / "bin" / "python"), "-c", program]
    try:
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return ""
    seen, _, version = done.stdout.decode().strip().partition(" ")
    return version if seen == "False" else ""


def check_net() -> list[Finding]:
    """Whether the hub of the models answers, and MMCU's where that is another one: its absence fails nothing else."""
    key, url = _hub(os.environ.get("SOURCE") or "modelscope")
    found = [_ask(url, "FAIL", f"Another hub or mirror: SOURCE, {key} in .env")]
    key_of_mmcu, url_of_mmcu = _hub(os.environ.get("MMCU_SOURCE") or "huggingface")
    if url_of_mmcu != url:
        advice = f"Only make mmcu-download asks it. A mirror: {key_of_mmcu} in .env; another hub: MMCU_SOURCE"
        found.append(_ask(url_of_mmcu, "warn", f"{advice}; a folder that has the data: MMCU_DATA_DIR"))
    return found


def _hub(source: str) -> tuple[str, str]:
    """The setting that names a hub's address, and the address."""
    is_modelscope = source == "modelscope"
    key, public = ("MODELSCOPE_ENDPOINT", "modelscope.cn") if is_modelscope else ("HF_ENDPOINT", "huggingface.co")
    return key, os.environ.get(key) or f"https://{public}"


def _ask(address: str, level: str, advice: str) -> Finding:
    """Whether an address answers on its port; `level` and `advice` when it does not."""
    url = urlparse(address)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError as error:
        return level, "net", f"{url.netloc} does not answer ({error}). {advice}"
    return "ok", "net", f"{url.netloc} answers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="store_true", help="also try the hubs that SOURCE and MMCU_SOURCE name")
    arguments = parser.parse_args()
    checks = [check_settings, check_cards, check_memory, check_disks, check_python]
    findings = []
    for check in [*checks, check_net] if arguments.net else checks:
        try:
            findings += check()
        except OSError as error:  # a place this user may not even look into
            findings.append(("FAIL", check.__name__.removeprefix("check_"), settings.advice_on(error)))
    try:
        for level, subject, text in findings:
            print(f"{level:<5} {subject:<15} {text}", flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 1 if any(level == "FAIL" for level, _, _ in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
