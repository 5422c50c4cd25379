"""The settings of this machine, in one grammar for `.env` that make, bash and python-dotenv read alike.

    python3 scripts/settings.py make      # lines for the Makefile: export KEY ?= value
    python3 scripts/settings.py shell     # lines for a launch script: export KEY=value
    python3 scripts/settings.py config    # every value and where it came from, secrets masked
    python3 scripts/settings.py names LIMT ...      # is one of make's variables a mistyped one? Says which, or nothing

Precedence: command line > environment > `.env` > default. `.env.example` is the list of keys, their meanings and
defaults. A value there that starts with / is a place on one machine: an example, never a default.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEY, ALLOWED = "[A-Z][A-Z0-9_]*", "A-Za-z0-9_./:@,+=%-"
LINE = re.compile(f"({KEY})=([{ALLOWED}]*)")
SECRET = re.compile(r"(TOKEN|KEY)$")
# What make's command line takes besides the settings.
MAKE_WORDS = "ARGS BG DRY_RUN FILE FOLLOW GPU GPUS LIMIT NET QUESTION STEP TIMEOUT".split()
WORDS_OF_ALL = ("ARGS", "BG", "DRY_RUN")  # every target takes these
CARDS = ("CUDA_VISIBLE_DEVICES", "BAICHUAN_GPUS")
PORT = r"\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]", "a port between 1 and 65535"
# Values that would be taken for something else, or end in another program's traceback hours later. Not of SOURCE and
# ENGINE: an environment may have such names for other programs, and every step is checked.
VALUES = {
    "BAICHUAN_GPUS": (r"\d+(,\d+)*", "numbers of cards separated by commas, such as 0,1"),
    "CUDA_VISIBLE_DEVICES": (r"-1|[\w/.-]+(,[\w/.-]+)*", "cards separated by commas, such as 0,1"),
    "TORCH_INDEX_URL": (r"(https?|file)://.+", "an address, such as that of PyTorch's wheels ending in /whl/cu126"),
    "MMCU_SOURCE": ("modelscope|huggingface", "modelscope or huggingface"),
    "KEEP_ORIGINAL": ("[01]", "0 or 1"),
    "QWEN_EVAL_MODE": ("generate|likelihood", "generate or likelihood"),
    "QWEN_EVAL_LIMIT": (r"\d+", "a number of rows, 0 for all"),
    "EVAL_ANSWER": ("generate|likelihood|engine|service", "generate, likelihood, engine or service"),
    "MMCU_NTRAIN": (r"\d+", "a number of worked examples"),
    **dict.fromkeys(("MASTER_PORT", "BAICHUAN_PORT", "BAICHUAN_WEB_PORT", "TUNNEL_SSH_PORT"), PORT),
}
TRAIN_CONFIGS = ("qwen_qlora/config/qwen-14b-qlora.json", "llm_code/training_config/baichuan2_config.json")


class SettingsError(ValueError):
    """A line of `.env` that cannot be used, with its number and what to write instead."""


def read_example(path: Path = ROOT / ".env.example") -> dict[str, str]:
    """All keys and the values `.env.example` gives them."""
    return _parse(path)


def read_env(path: Path = ROOT / ".env") -> dict[str, str]:
    """The keys a person set in `.env`; none when there is no such file.

    Raises SettingsError for a bad line, an unknown or repeated key, and a value missing where empty has no meaning.
    """
    if not path.exists():
        return {}
    values = _parse(path)
    known, may_be_empty = read_example(), _keys_with_a_meaning_of_empty()
    for number, key, value in _assignments(path):
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else "the keys are listed in .env.example."
            raise SettingsError(f"{path.name}:{number}: unknown key {key}; {hint}")
        if not value and key not in may_be_empty:
            raise SettingsError(f"{path.name}:{number}: {key} has no value, for example: {key}={known[key]}")
    return values


def defaults() -> dict[str, str]:
    """What a key is when nobody says anything."""
    return {key: value for key, value in read_example().items() if not value.startswith("/")}


def resolve() -> dict[str, str]:
    """The value of every key that has one, the environment first."""
    return {**defaults(), **read_env(), **{key: os.environ[key] for key in read_example() if key in os.environ}}


def check_values(values: dict[str, str]) -> None:
    """Raise SettingsError for a value that its key cannot have, wherever it came from."""
    for key in VALUES:
        if problem := _problem(key, values.get(key, "")):
            raise SettingsError(problem)


def _problem(key: str, value: str) -> str:
    """What is wrong with a value, empty where nothing is."""
    pattern, expected = VALUES.get(key, ("", ""))
    if value and pattern and not re.fullmatch(pattern, value, re.ASCII):
        return f"{key} must be {expected}, got: {value}"
    cards = value.split(",") if key in CARDS else []
    return f"{key} names a card twice: {value}" if len(set(cards)) < len(cards) else ""


def load() -> None:
    """Put the settings into the environment, where what is there already wins; for programs started by hand."""
    values = resolve()
    check_values(values)
    for key, value in values.items():
        if value:
            os.environ.setdefault(key, value)


def advice_on(error: OSError) -> str:
    """What to do about a file or folder that cannot be used: the settings that lead to it, where some do."""
    if error.filename is None:
        return str(error)
    path = f"{os.fsdecode(error.filename)}/"
    places = {key: f"{os.environ[key]}/" for key in read_example() if os.environ.get(key, "").startswith("/")}
    keys = [key for key, place in places.items() if path.startswith(place)]
    keys = keys or [key for key, place in places.items() if place.startswith(path)]
    advice = f". Set {', '.join(keys)} in .env to a folder you may use" if keys else ""
    return f"{error.filename}: {error.strerror}{advice}"


def _assignments(path: Path) -> list[tuple[int, str, str]]:
    """(line number, key, value) of every assignment."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match:
            expected = "KEY=value with no spaces, quotes, ~, $ or trailing comment"
            raise SettingsError(f"{path.name}:{number}: expected {expected}, got: {line}{_refused(line)}")
        found.append((number, match[1], match[2]))
    return found


def _refused(line: str) -> str:
    """Which character keeps a line from being an assignment, in words; a blank at its end cannot be seen."""
    key, _, value = line.partition("=")
    found = re.search(f"[^{ALLOWED}]", value) if re.fullmatch(KEY, key) else None
    return f" ({found[0]!r} is none of letters A to z, digits, _ . / : @ , + = % -)" if found else ""


def _parse(path: Path) -> dict[str, str]:
    values: dict[str, str] = {}
    for number, key, value in _assignments(path):
        if key in values:
            raise SettingsError(f"{path.name}:{number}: {key} is set a second time; keep one of the lines.")
        values[key] = value
    return values


def _keys_with_a_meaning_of_empty() -> set[str]:
    """The keys whose comment in `.env.example` says what `Empty:` means."""
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    return set(re.findall(r"^#.* Empty: .*\n([A-Z][A-Z0-9_]*)=", text, re.MULTILINE))


def make_lines() -> str:
    """What the Makefile includes; an empty value is left out, so that no program sees an empty HF_ENDPOINT."""
    check_values(resolve())  # also what make's own command line says: it is in the recipe's environment
    values = {**defaults(), **read_env()}
    # A bad value that the command line overrides is left out: the next call would have it in its environment from here,
    # where it hides a mended .env.
    lines = [f"export {key} ?= {value}" for key, value in values.items() if value and not _problem(key, value)]
    return "\n".join([f"SETTINGS := {' '.join(read_example())}", *lines]) + "\n"


def shell_lines() -> str:
    """What a launch script evaluates: only what the environment does not say already."""
    check_values(resolve())
    values = {**defaults(), **read_env()}
    lines = [f"export {key}={shlex.quote(value)}\n" for key, value in values.items() if value and key not in os.environ]
    return "".join(lines)


def mistyped(names: list[str], goals: list[str]) -> str:
    """What is wrong with the first name that looks like a known one but is none, or that no goal reads; else empty.

    Make takes any name, so `LIMT=500` would ask all questions. Names that look like nothing here (HTTPS_PROXY) pass.
    """
    for name in names:
        if meant := _meant(name):
            return f"{name} on the command line is no setting: perhaps {' or '.join(meant)} is meant\n"
        readers = readers_of(name)
        if readers is not None and not set(readers) & set(goals):
            unread = f"make {goals[0]} does not read it{_instead(name, goals[0])}"
            return f"{name} is for make {', '.join(readers)}; {unread}\n"
    return ""


def readers_of(word: str) -> list[str] | None:
    """The targets whose recipes read a word of make's command line; None for what any target may read."""
    if word not in MAKE_WORDS or word in WORDS_OF_ALL:
        return None
    blocks = (ROOT / "Makefile").read_text(encoding="utf-8").split("\n.PHONY: ")[1:]
    return [block.split()[0] for block in blocks if f"$({word})" in block]


def _instead(word: str, goal: str) -> str:
    """Which setting says the same to a goal, if one does."""
    step, project = goal.upper().replace("-", "_"), goal.split("-")[0].upper()
    names = [f"{step}_{word}", f"{project}_{word}", f"{project}_{word}S"]
    if word in ("GPU", "GPUS") and project in ("QWEN", "BAICHUAN"):
        names = ["BAICHUAN_GPUS" if goal == "baichuan-train" else "CUDA_VISIBLE_DEVICES"]
    found = next((name for name in names if name in read_example()), None)
    return f": perhaps {found} is meant" if found else ""


def _meant(name: str) -> list[str]:
    """Settings and flags of the trainings whose names are close to an unknown one, or hold it as a word."""
    known = [*read_example(), *MAKE_WORDS]
    if name in known or name == "PATH":
        return []
    flags = _training_flags()
    close = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.8)
    parts = [key for key in known if f"_{name.upper()}_" in f"_{key}_"]
    as_flags = difflib.get_close_matches(name.lower(), flags, 1, cutoff=0.8)
    as_flags = as_flags or [flag for flag in flags if flag.endswith(f"_{name.lower()}")]
    return parts[:3] or close or [f'ARGS="--{flag} ..."' for flag in as_flags]


def _training_flags() -> list[str]:
    """What the shipped configurations of the trainings set, which a person may take for settings of make."""
    found: set[str] = set()
    for path in TRAIN_CONFIGS:
        try:
            found.update(json.loads((ROOT / path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # edited by hand: the training says what is wrong with it
            continue
    return sorted(found)


def config_lines(origins: dict[str, str]) -> str:
    """One line a key: value and origin. `origins` is what make knows: KEY -> command line, environment, file."""
    from_file, values = read_env(), resolve()
    lines = []
    for key in read_example():
        value = values.get(key, "")
        origin = origins.get(key, "environment" if key in os.environ else "file")
        if origin not in ("command line", "environment"):
            origin = ".env" if key in from_file else "default" if key in values else "not set"
        shown = "**********" if value and SECRET.search(key) else value
        lines.append(f"{key:<22} {shown or '(empty)':<60} {origin}\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["make", "shell", "config", "names"])
    parser.add_argument(
        "words", nargs="*", help="for config: KEY=ORIGIN, where make has the key from; for names: names"
    )
    parser.add_argument("--goals", nargs="+", default=["help"], help="for names: make's targets")
    arguments = parser.parse_args()
    try:
        if arguments.form == "config":
            text = config_lines(dict(origin.split("=", 1) for origin in arguments.words))
        elif arguments.form == "names":
            text = mistyped(arguments.words, arguments.goals)
        else:
            text = make_lines() if arguments.form == "make" else shell_lines()
    except (SettingsError, OSError) as error:  # OSError: a .env that cannot be read
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
