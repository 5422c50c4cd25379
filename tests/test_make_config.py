"""make with and without .env: what config shows, what is refused and how, and the exact command of every step."""

import os
import shlex
import subprocess

import pytest

PLACES = {
    "ENVS_DIR": "/envs",
    "BASE_MODEL_DIR": "/models",
    "QWEN_MODEL_DIR": "/models/my qwen",
    "QWEN_OUTPUT_DIR": "/out",
    "QWEN_ADAPTER_DIR": "/out/final",
    "QWEN_MERGED_DIR": "/merged",
}
DATA = "qwen_qlora/data/text_matching_data"
BASE = ["--model_name_or_path", "/models/my qwen", "--load_in_4bit"]
MODULE = ["python", "-m", "qwen_qlora.evaluation.model_evaluation"]


def evaluation(suffix: str = "", file: str = "") -> list[str]:
    """The flags of an evaluation, whose result has the model in its name unless the call names the file."""
    result = file or f"{DATA}_test_result{suffix}.csv"
    return f"--test_file {DATA}_test.jsonl --result_file {result} --mode generate --limit 500".split()


COMMANDS = {
    "quickstart": ["python3", "scripts/quickstart.py"],
    "doctor": ["python3", "scripts/doctor.py"],
    "doctor NET=1": ["python3", "scripts/doctor.py", "--net"],
    "doctor ARGS=--net": ["python3", "scripts/doctor.py", "--net"],
    "quickstart ARGS=-x": ["python3", "scripts/quickstart.py", "-x"],
    "qwen-env ARGS=-x": ["python3", "scripts/environment.py", "qwen_env", "-x"],
    "test ARGS=-x": ["bash", "scripts/test.sh", "-x"],
    "lint": ["bash", "scripts/lint.sh"],
    "instance": ["python3", "scripts/instance.py"],
    "modelscope-env": ["python3", "scripts/environment.py", "modelscope_env"],
    "gpu": ["python3", "scripts/nvidia.py", "show"],
    "gpu-watch": ["python3", "scripts/nvidia.py", "watch"],
    "qwen-env": ["python3", "scripts/environment.py", "qwen_env"],
    "qwen-download SOURCE=huggingface ARGS=--help": shlex.split(
        "python -m qwen_qlora.qwen_download --model_id qwen/Qwen-14B-Chat --revision v1.0.8 --source huggingface "
        "--download_dir /models --model_dir '/models/my qwen' --keep_original 1 --help"
    ),
    "qwen-data": shlex.split(
        "python -m finetune.data_report --model_dir '/models/my qwen' "
        f"--train_file {DATA}_train.jsonl --test_file {DATA}_test.jsonl "
        "--train_args_file qwen_qlora/config/qwen-14b-qlora.json"
    ),
    "qwen-plan GPU=A100-80G GPUS=2": shlex.split(
        "python3 -m finetune.plan --method qlora --train_args_file qwen_qlora/config/qwen-14b-qlora.json "
        f"--model '/models/my qwen' --train_file {DATA}_train.jsonl --output_dir /out --gpu A100-80G --num_gpus 2"
    ),
    "qwen-eval": [*MODULE, *BASE, "--adapter_name_or_path", "/out/final", *evaluation()],
    "qwen-eval QWEN_EVAL_MODEL=base": [*MODULE, *BASE, *evaluation("_base")],
    "qwen-eval QWEN_EVAL_MODEL=base QWEN_RESULT_FILE=$$HOME/b.csv": [*MODULE, *BASE, *evaluation(file="$HOME/b.csv")],
    "qwen-eval QWEN_EVAL_MODEL=merged QWEN_EVAL_LIMIT=": [
        *MODULE,
        "--model_name_or_path",
        "/merged",
        *evaluation("_merged")[:-2],
    ],
    "qwen-merge": shlex.split(
        "python -m qwen_qlora.utils.merge_lora --model_name_or_path '/models/my qwen' "
        "--adapter_name_or_path /out/final --save_path /merged"
    ),
    "bench-train ARGS=--list": ["python", "-m", "benchmarks.bench_train", "--list"],
    "qwen-chat": ["python", "-m", "finetune.chat", *BASE, "--adapter_name_or_path", "/out/final"],
}


@pytest.mark.parametrize("target", COMMANDS)
def test_a_dry_run_prints_the_exact_command_and_does_nothing(checkout, make, target):
    step = target.split()[0]
    done = make(*target.split(), "DRY_RUN=1", environment=PLACES)
    assert done.returncode == 0, done.stderr
    prefix = f"-----> {step}: "
    assert done.stdout.startswith(prefix)
    assert shlex.split(done.stdout.removeprefix(prefix)) == COMMANDS[target]
    assert not (checkout / "logs").exists()


def test_a_dry_run_of_training_goes_through_the_launch_script(make):
    done = make("qwen-train", "DRY_RUN=1", 'ARGS=--learning_rate 1e-4 --output_dir "/o p"', environment=PLACES)
    words = shlex.split(done.stdout)
    assert words[:2] == ["----->", "qwen-train:"]
    assert "qwen_qlora.train_qlora" in words
    assert words[words.index("--model_name_or_path") + 1] == "/models/my qwen"
    assert words[-4:] == ["--learning_rate", "1e-4", "--output_dir", "/o p"]


def test_the_launch_script_by_hand_does_what_make_does(checkout, make, tmp_path):
    """From any directory, with the settings of .env, where the environment wins."""
    lines = [f"{key}={value}" for key, value in PLACES.items() if " " not in value]
    (checkout / ".env").write_text("\n".join([*lines, "QWEN_MODEL_DIR=/models/from-file", "CUDA_VISIBLE_DEVICES="]))
    environment = {**os.environ, "QWEN_OUTPUT_DIR": "/out/from environment", "DRY_RUN": "1"}
    command = ["bash", str(checkout / "qwen_qlora" / "train_qwen_qlora.sh"), "--seed", "7"]
    by_hand = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    words = shlex.split(by_hand)
    assert words[words.index("--model_name_or_path") + 1] == "/models/from-file"
    assert words[words.index("--output_dir") + 1] == "/out/from environment"
    assert by_hand == make("qwen-train", "ARGS=--seed 7", environment=environment).stdout


def test_config_shows_every_key_with_its_origin_and_hides_secrets(checkout, make):
    (checkout / ".env").write_text("HF_TOKEN=hf_abc\nSOURCE=huggingface\nPRICE_PER_HOUR=\n")
    done = make("config", "KEEP_ORIGINAL=0", environment={"QWEN_OUTPUT_DIR": "/my out"})
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert "hf_abc" not in done.stdout + done.stderr
    assert lines["HF_TOKEN"].split() == ["**********", ".env"]
    assert lines["SOURCE"].split() == ["huggingface", ".env"]
    assert lines["PRICE_PER_HOUR"].split() == ["(empty)", ".env"]
    assert lines["KEEP_ORIGINAL"].split() == ["0", "command", "line"]
    assert lines["QWEN_OUTPUT_DIR"].split() == ["/my", "out", "environment"]
    assert lines["QWEN_MODEL_DIR"].split() == ["(empty)", "not", "set"]
    example = [line.split("=")[0] for line in (checkout / ".env.example").read_text().splitlines() if "=" in line]
    assert list(lines) == [key for key in example if not key.startswith("#")]


def test_a_setting_without_value_is_asked_for_before_anything_runs(checkout, make):
    first = make("qwen-merge", "DRY_RUN=1")
    assert first.returncode == 2 and "There is no .env yet: cp .env.example .env" in first.stderr
    (checkout / ".env").write_text("ENVS_DIR=/envs\n")
    second = make("qwen-merge", "DRY_RUN=1")
    expected = "qwen-merge needs QWEN_MODEL_DIR. Set it in .env, or run: make qwen-merge QWEN_MODEL_DIR=..."
    assert second.returncode == 2 and expected in second.stderr


def test_a_broken_env_stops_steps_with_file_and_line_but_not_help_and_stop(checkout, make):
    (checkout / ".env").write_text("QWEN_MODEL_DIR=/m # mine\n")
    refused = make("qwen-chat")
    assert refused.returncode == 2 and "error: .env:1: expected KEY=value" in refused.stderr
    for target in ("help", "stop", "status"):
        assert make(target).returncode == 0
    diagnosis = make("doctor")
    assert diagnosis.returncode != 0 and "FAIL  settings        .env:1: expected KEY=value" in diagnosis.stdout


def test_a_changed_and_a_removed_env_are_noticed(checkout, make):
    file = checkout / ".env"
    for value in ("modelscope", "huggingface"):
        file.write_text(f"SOURCE={value}\n")
        assert f"SOURCE {value} .env" in " ".join(make("config").stdout.split())
    file.unlink()
    assert "SOURCE modelscope default" in " ".join(make("config").stdout.split())


@pytest.mark.parametrize(
    "word, meant",
    [
        ("DRYRUN=1", "DRY_RUN"),
        ("LIMT=500", "LIMIT"),
        ("QWEN_MODLE_DIR=/m", "QWEN_MODEL_DIR"),
        ("gpu=A40", "GPU"),
        ("STAGE=2", "DEEPSPEED_STAGE"),
        ("DEEPSPEED=2", "DEEPSPEED_STAGE"),
        ("OUTPUT_DIR=/o", "QWEN_OUTPUT_DIR or BAICHUAN_OUTPUT_DIR"),
        ("EPOCHS=3", 'ARGS="--num_train_epochs ..."'),
        ("num_train_epochs=3", 'ARGS="--num_train_epochs ..."'),
        ("LR_SCHEDULER=cosine", 'ARGS="--lr_scheduler_type ..."'),
    ],
)
def test_a_mistyped_name_on_the_command_line_starts_nothing(make, word, meant):
    done = make("qwen-train", word, environment=PLACES)
    expected = f"{word.partition('=')[0]} on the command line is no setting: perhaps {meant} is meant"
    assert done.returncode == 2 and expected in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "target, word, meant",
    [
        ("baichuan-train", "GPUS=4", "BAICHUAN_GPUS"),
        ("baichuan-serve", "GPU=1", "CUDA_VISIBLE_DEVICES"),
        ("qwen-eval", "GPU=1", "CUDA_VISIBLE_DEVICES"),
        ("qwen-train", "GPU=A100-80G", "CUDA_VISIBLE_DEVICES"),
        ("qwen-eval", "LIMIT=5", "QWEN_EVAL_LIMIT"),
        ("qwen-train", "LIMIT=5", None),
        ("baichuan-web", "FILE=questions.txt", None),
    ],
)
def test_a_word_that_the_target_does_not_read_starts_nothing(make, target, word, meant):
    done = make(target, word, environment=PLACES)
    name = word.partition("=")[0]
    expected = f"make {target} does not read it" + (f": perhaps {meant} is meant" if meant else "")
    assert done.returncode == 2 and f"{name} is for make " in done.stderr and not done.stdout
    assert f"{expected}.  Stop." in done.stderr


def test_cards_are_checked_on_makes_command_line_and_in_the_environment_too(checkout, make):
    expected = "error: BAICHUAN_GPUS must be numbers of cards separated by commas"
    assert expected in make("baichuan-plan", "BAICHUAN_GPUS=0-3", "DRY_RUN=1", environment=PLACES).stderr
    assert expected in make("baichuan-plan", "DRY_RUN=1", environment=PLACES | {"BAICHUAN_GPUS": "0 1"}).stderr
    (checkout / ".env").write_text("BAICHUAN_GPUS=0,1,\n")
    assert expected in make("baichuan-plan", "DRY_RUN=1", environment=PLACES).stderr
    assert make("baichuan-plan", "BAICHUAN_GPUS=0,1", "DRY_RUN=1", environment=PLACES).returncode == 0


def test_words_pass_where_they_are_read(make):
    for target, *words in (
        ("qwen-plan", "GPU=A40", "GPUS=1"),
        ("qwen-eval-mmcu", "LIMIT=5", "MMCU_DATA_DIR=/d"),
        ("baichuan-client", "QUESTION=a"),
        ("qwen-data", "BG=0"),
    ):
        assert make(target, *words, "DRY_RUN=1", environment=PLACES).returncode == 0


@pytest.mark.parametrize("content", ['{"a": 1,}', '[{"a": 1}]', "7"])
def test_a_configuration_edited_wrongly_hinders_no_step(checkout, make, content):
    """Its own training says what is wrong with it."""
    (checkout / "llm_code" / "training_config" / "baichuan2_config.json").write_text(content)
    done = make("status", "STEP=qwen-train")
    assert "Traceback" not in done.stderr and "mistyped" not in done.stderr
    assert "perhaps LIMIT is meant" in make("qwen-train", "LIMT=500", environment=PLACES).stderr
    assert 'perhaps ARGS="--num_train_epochs ..."' in make("qwen-train", "EPOCHS=3", environment=PLACES).stderr


def test_names_that_look_like_no_setting_pass(make):
    assert make("help", "HTTPS_PROXY=http://127.0.0.1:1", "OMP_NUM_THREADS=2", "CUDA_HOME=/c").returncode == 0


def test_an_unknown_evaluation_model_is_refused(make):
    done = make("qwen-eval", "QWEN_EVAL_MODEL=lora", "DRY_RUN=1", environment=PLACES)
    assert done.returncode == 2 and "QWEN_EVAL_MODEL must be base, adapter or merged, got: lora" in done.stderr


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("BAICHUAN_GPUS=0", "BAICHUAN_GPUS=0,", "such as 0,1, got: 0,"),
        ("CUDA_VISIBLE_DEVICES=1", "CUDA_VISIBLE_DEVICES=0,0", "names a card twice: 0,0"),
    ],
)
def test_a_mended_env_is_taken_again(checkout, make, good, bad, message):
    """make exports what it has read: a bad value must not stay in the environment of its later calls."""
    for before in ("", f"{good}\n"):  # with nothing remembered yet, and behind a call that went well
        (checkout / ".env").write_text(before)
        assert make("config").returncode == 0
        (checkout / ".env").write_text(f"{bad}\n")
        for _ in range(2):
            refused = make("config")
            assert refused.returncode == 2 and message in refused.stderr
        (checkout / ".env").write_text(f"{good}\n")
        mended = make("config")
        key, value = good.split("=")
        assert mended.returncode == 0 and f"{key:<22} {value:<60} .env\n" in mended.stdout


def test_an_env_that_cannot_be_read_is_named(checkout, make):
    (checkout / ".env").mkdir()
    refused = make("config")
    assert refused.returncode == 2 and "Is a directory" in refused.stderr and "Traceback" not in refused.stderr
