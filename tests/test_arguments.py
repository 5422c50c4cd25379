"""Experiments from JSON files and flags: the walkthrough's keys, precedence, and what is refused with which words."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.arguments import parse_arguments, require
from finetune.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
# The keys that the walkthrough's two files hold.
QWEN_KEYS = """output_dir model_name_or_path train_file num_train_epochs per_device_train_batch_size
gradient_accumulation_steps learning_rate max_seq_length logging_steps save_steps save_total_limit lr_scheduler_type
warmup_steps lora_rank lora_alpha lora_dropout gradient_checkpointing optim seed fp16 report_to dataloader_num_workers
save_strategy weight_decay max_grad_norm""".split()
BAICHUAN = {
    "deepspeed": "llm_code/deepspeed_config/deepspeed_stage_3_config.json",
    "train_file": "rows.jsonl",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-5,
    "max_seq_length": 512,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 200,
    "gradient_checkpointing": False,
    "optim": "adamw_hf",
    "dataloader_num_workers": 5,
    "max_grad_norm": 1.0,
}


def parse(tmp_path: Path, content: dict | str, *flags: str):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return parse_arguments(["--train_args_file", str(path), *flags])


def refusal(tmp_path: Path, content: dict | str, *flags: str) -> str:
    with pytest.raises(UserError) as failure:
        parse(tmp_path, content, *flags)
    return str(failure.value)


def test_the_shipped_file_has_the_walkthroughs_keys_and_values() -> None:
    path = REPOSITORY / "qwen_qlora" / "config" / "qwen-14b-qlora.json"
    assert sorted(json.loads(path.read_text())) == sorted(QWEN_KEYS)
    arguments = parse_arguments(["--train_args_file", str(path)])
    train, lora = arguments.train, arguments.lora
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (8, 4)
    assert (train.learning_rate, train.max_grad_norm, train.warmup_steps) == (5e-5, 0.3, 300)
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout) == (64, 16, 0.05)
    assert (train.optim, train.lr_scheduler_type) == ("paged_adamw_32bit", "constant_with_warmup")
    assert train.fp16 and train.gradient_checkpointing and arguments.data.max_seq_length == 1024
    assert arguments.notices == ()


def test_every_key_of_the_second_walkthrough_file_is_understood(tmp_path: Path) -> None:
    arguments = parse(tmp_path, BAICHUAN)
    changed = {"optim": "adamw_torch"}
    assert {key: arguments.as_dict()[key] for key in BAICHUAN} == {**BAICHUAN, **changed}
    assert any("adamw_hf" in notice and "adamw_torch" in notice for notice in arguments.notices)
    assert any("dataloader_num_workers" in notice for notice in arguments.notices)


def test_a_flag_beats_the_file_and_the_last_flag_wins(tmp_path: Path) -> None:
    arguments = parse(
        tmp_path, {"learning_rate": 1e-5, "seed": 1}, "--learning_rate", "2e-4", "--learning_rate", "3e-4"
    )
    assert (arguments.train.learning_rate, arguments.train.seed) == (3e-4, 1)
    assert not parse(
        tmp_path, {"gradient_checkpointing": True}, "--gradient_checkpointing", "false"
    ).train.gradient_checkpointing


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("pre_device_train_batch_size", "per_device_train_batch_size"),
        ("module_name_or_path", "model_name_or_path"),
        ("gradient_accumulation_step", "gradient_accumulation_steps"),
        ("lora_rang", "lora_rank"),
    ],
)
def test_a_mistyped_key_gets_the_right_one(tmp_path: Path, mistyped: str, meant: str) -> None:
    text = refusal(tmp_path, {mistyped: 3})
    assert f"config.json: unknown key `{mistyped}` (did you mean `{meant}`?)" in text
    assert f"did you mean `{meant}`" in refusal(tmp_path, {}, f"--{mistyped}", "3")


def test_a_dropout_of_one_half_is_remarked_upon(tmp_path: Path) -> None:
    (notice,) = parse(tmp_path, {"lora_dropout": 0.5}).notices
    assert "0.5" in notice and "0.05" in notice
    assert "below 1" in refusal(tmp_path, {"lora_dropout": 1})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"learning_rate": "5e-5"}, '`learning_rate` must be a number, found "5e-5". Remove the quotes.'),
        ({"lora_rank": 6.5}, "`lora_rank` must be a whole number, found 6.5"),
        ({"fp16": 1}, "`fp16` must be true or false, found 1"),
        ({"lora_rank": True}, "`lora_rank` must be a whole number, found true"),
        ({"per_device_train_batch_size": 0}, "must be at least 1, found 0"),
        ({"lr_scheduler_type": "cosin"}, "did you mean `cosine`"),
        ({"optim": "paged_adam_32bit"}, "did you mean `paged_adamw_32bit`"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both true"),
        ('{"seed": 1, "seed": 2}', "config.json: the key `seed` stands there twice"),
        ('{"seed": 1,\n}', "config.json:2: not JSON"),
        ("[1]", "expected an object"),
        ({"eval_split_percentage": 100}, "`eval_split_percentage` must be below 100, found 100"),
        ('{"num_train_epochs": Infinity}', "`num_train_epochs` must be a finite number, found inf"),
        ('{"max_grad_norm": NaN}', "`max_grad_norm` must be at least 0, found nan"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(tmp_path: Path, content: dict | str, words: str) -> None:
    assert words in refusal(tmp_path, content)


def test_gradients_may_have_no_limit() -> None:
    assert parse_arguments(["--max_grad_norm", "inf"]).train.max_grad_norm == math.inf


def test_a_file_in_gbk_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "配置.json"
    path.write_text('{"output_dir": "/root/输出"}', encoding="gbk")
    with pytest.raises(UserError, match="--train_args_file in UTF-8, found byte 0xca.*iconv -f GBK"):
        parse_arguments(["--train_args_file", str(path)])


def test_a_missing_file_and_a_missing_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        parse_arguments(["--train_args_file", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="`train_file` is not set. Do this"):
        require(parse_arguments([]), train_file="Do this.")


def test_help_names_every_key_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, qwen_qlora.train_qlora as t; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True).stdout == "[]\n"
    command = [sys.executable, "-m", "qwen_qlora.train_qlora", "--help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert all(f"--{key} " in shown for key in [*QWEN_KEYS, *BAICHUAN])
