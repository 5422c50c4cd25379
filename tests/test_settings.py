"""The grammar of .env, and the promise that make, bash and python-dotenv read it alike."""

import os
import re
import subprocess
import sys
from pathlib import Path

import dotenv
import pytest

from scripts import settings

ALL_CHARACTERS = "HF_TOKEN=aZ09_./:@,+=%-#".rstrip("#")


def in_make(file: Path, key: str) -> str:
    makefile = f"include {file}\nshow: ; @printf '%s' '$({key})'"
    return subprocess.run(["make", "-f-", "show"], input=makefile, capture_output=True, text=True, check=True).stdout


def in_bash(file: Path, key: str) -> str:
    command = f"set -a; . {file}; printf '%s' \"${key}\""
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout


def test_make_bash_and_dotenv_agree_on_the_example_and_on_every_allowed_character(tmp_path):
    file = tmp_path / ".env"
    file.write_text((settings.ROOT / ".env.example").read_text().replace("HF_TOKEN=", ALL_CHARACTERS))
    ours = settings.read_env(file)
    assert ours["HF_TOKEN"] == "aZ09_./:@,+=%-"
    assert dotenv.dotenv_values(file) == ours
    for key, value in ours.items():
        assert in_make(file, key) == value
        assert in_bash(file, key) == value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("BAICHUAN_GPUS", "0,1,", "BAICHUAN_GPUS must be numbers of cards separated by commas, such as 0,1, got: 0,1,"),
        ("BAICHUAN_GPUS", "0 1", "separated by commas"),
        ("BAICHUAN_GPUS", "0，1", "separated by commas"),
        ("BAICHUAN_GPUS", "0-3", "separated by commas"),
        ("BAICHUAN_GPUS", "0,0", "BAICHUAN_GPUS names a card twice: 0,0"),
        ("CUDA_VISIBLE_DEVICES", "0 1", "separated by commas"),
        ("CUDA_VISIBLE_DEVICES", "0,,1", "separated by commas"),
        ("TORCH_INDEX_URL", "cu126", "TORCH_INDEX_URL must be an address"),
        ("MMCU_SOURCE", "modelscop", "MMCU_SOURCE must be modelscope or huggingface, got: modelscop"),
        ("KEEP_ORIGINAL", "yes", "KEEP_ORIGINAL must be 0 or 1, got: yes"),
        ("QWEN_EVAL_LIMIT", "all", "QWEN_EVAL_LIMIT must be a number of rows, 0 for all, got: all"),
        ("QWEN_EVAL_MODE", "greedy", "QWEN_EVAL_MODE must be generate or likelihood"),
        ("EVAL_ANSWER", "letters", "EVAL_ANSWER must be generate, likelihood, engine or service, got: letters"),
        ("BAICHUAN_PORT", "65536", "BAICHUAN_PORT must be a port between 1 and 65535, got: 65536"),
        ("MASTER_PORT", "abc", "MASTER_PORT must be a port"),
    ],
)
def test_a_value_that_its_key_cannot_have_is_refused_wherever_it_is_from(monkeypatch, key, value, message):
    monkeypatch.setenv(key, value)
    for read in (settings.load, settings.shell_lines):
        with pytest.raises(settings.SettingsError, match=re.escape(message)):
            read()


@pytest.mark.parametrize("cards", ["0", "0,1", "-1", "GPU-8f2c1a3e,GPU-77b0", "MIG-GPU-8f2c/1/0", ""])
def test_cards_are_named_as_cuda_takes_them(cards):
    settings.check_values({"MASTER_PORT": "65535", "BAICHUAN_PORT": "0", "EVAL_ANSWER": "service"})
    settings.check_values({"SOURCE": "/src", "ENGINE": "docker"})
    settings.check_values({"CUDA_VISIBLE_DEVICES": cards, "BAICHUAN_GPUS": "0,1", "TORCH_INDEX_URL": "file:///wheels"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SOURCE = huggingface", "expected KEY=value with no spaces"),
        ('SOURCE="huggingface"', "expected KEY=value with no spaces"),
        ("QWEN_MODEL_DIR=~/model", "no spaces, quotes, ~"),
        ("QWEN_MODEL_DIR=$HOME/model", "no spaces, quotes, ~, $"),
        ("SOURCE=huggingface # faster", "trailing comment, got: SOURCE=huggingface # faster"),
        ("export SOURCE=huggingface", "expected KEY=value"),
        (
            "QWEN_OUTPUT_DIR=/root/训练",
            "/root/训练 ('训' is none of letters A to z, digits, _ . / :",
        ),
        ("API_KEY=abc!def", "('!' is none of"),
        ("SOURCE=huggingface ", "got: SOURCE=huggingface  (' ' is none of"),
        ("source=huggingface", "expected KEY=value"),
        ("QWEN_MODLE_DIR=/m", "unknown key QWEN_MODLE_DIR; did you mean QWEN_MODEL_DIR?"),
        ("ZZZ=1", "unknown key ZZZ; the keys are listed in .env.example."),
        ("SOURCE=", "SOURCE has no value, for example: SOURCE=modelscope"),
        ("ENV_MANAGER=uv", "ENV_MANAGER is set a second time"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_with_file_and_number(tmp_path, line, message):
    file = tmp_path / ".env"
    file.write_text(f"# mine\nENV_MANAGER=venv\n\n{line}\n")
    with pytest.raises(settings.SettingsError) as refused:
        settings.read_env(file)
    assert str(refused.value).startswith(".env:4: ")
    assert message in str(refused.value)


def test_empty_is_allowed_where_the_comment_says_what_it_means_and_bom_and_crlf_are_read(tmp_path):
    file = tmp_path / ".env"
    file.write_bytes("\ufeff# mine\r\nPRICE_PER_HOUR=\r\nSOURCE=huggingface\r\n".encode())
    assert settings.read_env(file) == {"PRICE_PER_HOUR": "", "SOURCE": "huggingface"}


def test_a_place_on_one_machine_is_no_default():
    example, defaults = settings.read_example(), settings.defaults()
    assert example["QWEN_MODEL_DIR"].startswith("/root/") and "QWEN_MODEL_DIR" not in defaults
    assert defaults["QWEN_MODEL_REVISION"] == "v1.0.8"


SOURCES = ["command line", "environment", ".env", "default"]
EXPECTED = {"command line": "from-line", "environment": "from-environment", ".env": "from-file", "default": "v1.0.8"}


@pytest.mark.parametrize("winner", SOURCES)
@pytest.mark.parametrize("reader", ["make", "bash", "python"])
def test_precedence_is_the_same_in_make_bash_and_python(checkout, make, reader, winner):
    """The winner and everything weaker is set; the value that arrives in the step's environment is the winner's."""
    weaker = SOURCES[SOURCES.index(winner) :]
    if ".env" in weaker:
        (checkout / ".env").write_text("QWEN_MODEL_REVISION=from-file\n")
    environment = {"QWEN_MODEL_REVISION": "from-environment"} if "environment" in weaker else {}
    if reader == "make":
        line = ["QWEN_MODEL_REVISION=from-line"] if winner == "command line" else []
        done = make("config", *line, environment=environment)
        value, origin = done.stdout.split("QWEN_MODEL_REVISION")[1].split("\n")[0].split(maxsplit=1)
        assert origin == winner
    else:
        if winner == "command line":  # what `KEY=value command` sets in both
            environment = {"QWEN_MODEL_REVISION": "from-line"}
        show = "print(os.environ['QWEN_MODEL_REVISION'])"
        programs = {
            "bash": 'set -eu; lines="$(python3 scripts/settings.py shell)"; eval "$lines"; echo "$QWEN_MODEL_REVISION"',
            "python": f"import os; from scripts import settings; settings.load(); {show}",
        }
        command = ["bash" if reader == "bash" else sys.executable, "-c", programs[reader]]
        variables = {**os.environ, **environment}
        done = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, check=True)
        value = done.stdout.strip()
    assert value == EXPECTED[winner]


def test_load_sets_nothing_for_an_empty_value(checkout):
    (checkout / ".env").write_text("CUDA_VISIBLE_DEVICES=\nHF_ENDPOINT=\n")
    program = "import os; from scripts import settings; settings.load(); print('HF_ENDPOINT' in os.environ)"
    variables = {key: value for key, value in os.environ.items() if key != "HF_ENDPOINT"}
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/data/envs/qwen_env/bin/python", "ENVS_DIR"),
        ("/data/envs", "ENVS_DIR"),
        ("/data", "BASE_MODEL_DIR, ENVS_DIR"),
        ("/data/envs2", ""),
    ],
)
def test_an_unusable_path_is_told_with_the_setting_that_leads_there(monkeypatch, path, keys):
    for key in settings.read_example():
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("ENVS_DIR", "/data/envs")
    monkeypatch.setenv("BASE_MODEL_DIR", "/data/models")
    advice = f". Set {keys} in .env to a folder you may use" if keys else ""
    assert settings.advice_on(PermissionError(13, "Permission denied", path)) == f"{path}: Permission denied{advice}"
    assert "Broken pipe" in settings.advice_on(BrokenPipeError(32, "Broken pipe"))


def test_keys_and_tokens_are_not_shown(monkeypatch):
    secrets = ("API_KEY", "UPSTREAM_API_KEY", "HF_TOKEN", "MODELSCOPE_API_TOKEN")
    for key in secrets:
        monkeypatch.setenv(key, "topsecret1")
    shown = settings.config_lines({})
    assert "topsecret1" not in shown and shown.count("**********") == len(secrets)
