"""The evaluation targets: the commands they print, and the page written through make from two finished results."""

import json
import shlex
import sys

import pytest

PLACES = {
    "ENVS_DIR": "/envs",
    "MMCU_DATA_DIR": "/data/mmcu",
    "EVAL_RESULT_DIR": "/results",
    "LLM_MODULE_MODEL_PATH": "/final",
    "BAICHUAN_MODEL_DIR": "/base",
    "QWEN_MODEL_DIR": "/qwen",
    "QWEN_ADAPTER_DIR": "/adapter",
}
MMCU = "python -m llm_code.llm_evaluation.mmcu"
MMCU_START = f"{MMCU} --data_dir /data/mmcu --ntrain 0 --save_dir /results"
BLEU = (
    "python -m llm_code.llm_evaluation.bleu --test_file llm_code/data/psychology_test_bleu.jsonl --input_file /results"
)
COMMANDS = {
    "mmcu-download": "python -m llm_code.llm_evaluation.mmcu_download --dataset_id Besteasy/MMCU --revision main "
    "--source huggingface --data_dir /data/mmcu",
    "baichuan-eval-mmcu LIMIT=500": f"{MMCU_START}/mmcu --model_name_or_path /final --answer generate --limit 500",
    "baichuan-eval-mmcu BAICHUAN_EVAL_MODEL=base EVAL_ANSWER=likelihood MMCU_NTRAIN=5": f"{MMCU} --data_dir /data/mmcu "
    "--ntrain 5 --save_dir /results/mmcu_base --model_name_or_path /base --answer likelihood",
    "baichuan-eval-mmcu BAICHUAN_EVAL_MODEL=service EVAL_ANSWER=likelihood": f"{MMCU_START}/mmcu_service "
    "--service_url http://127.0.0.1:10820 --answer service",
    "baichuan-eval-bleu ARGS=--seed=1": f"{BLEU}/psychology_result.txt "
    "--save_file /results/bleu/psychology_result_bleu.txt --model_name_or_path /final --answer generate --seed=1",
    "baichuan-eval-bleu BAICHUAN_EVAL_MODEL=base EVAL_ANSWER=likelihood": f"{BLEU}/psychology_result_base.txt "
    "--save_file /results/bleu/psychology_result_bleu_base.txt --model_name_or_path /base --answer generate",
    "qwen-eval-mmcu LIMIT=9": f"{MMCU} --model_name_or_path /qwen --load_in_4bit --adapter_name_or_path /adapter "
    "--answer generate --data_dir /data/mmcu --ntrain 0 --save_dir /results/qwen_mmcu_adapter --limit 9",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_of_a_target(make, words):
    done = make(*words.split(), "DRY_RUN=1", environment=PLACES)
    assert done.returncode == 0, done.stderr
    name = words.split()[0]
    assert shlex.split(done.stdout.strip().removeprefix(f"-----> {name}: ")) == shlex.split(COMMANDS[words])


def test_what_is_wrong_or_missing_is_named(make):
    done = make("baichuan-eval-bleu", "BAICHUAN_EVAL_MODEL=mine", "DRY_RUN=1", environment=PLACES)
    assert done.returncode == 2 and "must be base, final or service, got: mine" in done.stderr
    done = make("baichuan-eval-mmcu", environment={"ENVS_DIR": "/envs"})
    assert done.returncode == 2 and "baichuan-eval-mmcu needs MMCU_DATA_DIR" in done.stderr


def write_records(path, key, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"row": i, "prompt": f"第{i}问", "gold": "对", "predicted": "对", key: v} for i, v in enumerate(values)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("project", ["qwen", "baichuan"])
def test_the_page_is_written_through_make(make, tmp_path, project):
    environment = {"qwen": "qwen_env", "baichuan": "llm_env"}[project]
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / environment).symlink_to(sys.prefix)
    results, train = tmp_path / "results", tmp_path / "trained"
    train.mkdir()
    numbers = dict.fromkeys(("updates", "updates_planned", "seconds", "tokens", "supervised_tokens", "cost"), 1)
    about = {"method": "m", "status": "finished", "devices": "1 x cpu", "tokens_per_second": 1.0, "config_file": None}
    about |= {"versions": {}, "identity": {}, "git_commit": "abc"}
    (train / "train_report.json").write_text(json.dumps(numbers | about))
    if project == "qwen":
        for name, value in (("base", False), ("tuned", True)):
            write_records(results / f"{name}.jsonl", "correct", [value] * 9)
        files = {"QWEN_BASE_RESULT_FILE": results / "base.csv", "QWEN_RESULT_FILE": results / "tuned.csv"}
    else:
        for suffix, value in (("_base", 0.1), ("", 0.2)):
            write_records(results / "bleu" / f"psychology_result_bleu{suffix}.jsonl", "bleu", [value] * 9)
        files = {}
    places = {"ENVS_DIR": tmp_path / "envs", "EVAL_RESULT_DIR": results, f"{project.upper()}_OUTPUT_DIR": train}
    variables = {key: str(value) for key, value in (places | files).items()}
    done = make(f"{project}-report", environment=variables)
    assert done.returncode == 0, done.stderr
    assert "MMCU strict is left out" in done.stderr
    page = (results / f"{project}_report" / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# trained: before and after fine-tuning") and "better after fine-tuning" in page


@pytest.mark.parametrize("command_line", [[], ["QWEN_RESULT_FILE=/results/mine.csv"]])
def test_qwen_report_reads_what_qwen_eval_writes(make, checkout, command_line):
    """With the settings of a copied .env.example; one given for both calls wins."""
    (checkout / ".env").write_text("QWEN_RESULT_FILE=/results/r.csv\nQWEN_BASE_RESULT_FILE=/results/b.csv\n")
    places = {**PLACES, "QWEN_OUTPUT_DIR": "/out"}

    def words(*target):
        return shlex.split(make(*target, *command_line, "DRY_RUN=1", environment=places).stdout)

    report, written = words("qwen-report"), []
    for model in ("adapter", "base"):
        flags = words("qwen-eval", f"QWEN_EVAL_MODEL={model}")
        written.append(flags[flags.index("--result_file") + 1].replace(".csv", ".jsonl"))
    base, tuned = report[report.index("test rows") + 1 :][:2]
    assert tuned == written[0]
    assert base == written[1] or command_line


def test_results_are_kept_apart_where_the_settings_were_read_into_the_shell(make, checkout):
    (checkout / ".env").write_text("QWEN_RESULT_FILE=/results/r.csv\nQWEN_BASE_RESULT_FILE=/results/b.csv\n")
    places = {**PLACES, "QWEN_RESULT_FILE": "/results/r.csv", "QWEN_BASE_RESULT_FILE": "/results/b.csv"}
    flags = shlex.split(make("qwen-eval", "QWEN_EVAL_MODEL=base", "DRY_RUN=1", environment=places).stdout)
    assert flags[flags.index("--result_file") + 1] == "/results/b.csv"
    both = ["QWEN_RESULT_FILE=/mine/r.csv", "QWEN_BASE_RESULT_FILE=/mine/b.csv"]
    for model, file in (("base", "/mine/b.csv"), ("adapter", "/mine/r.csv")):
        done = make("qwen-eval", f"QWEN_EVAL_MODEL={model}", *both, "DRY_RUN=1", environment=places)
        flags = shlex.split(done.stdout)
        assert flags[flags.index("--result_file") + 1] == file


def test_a_question_keeps_its_dollars(make):
    question = "what is $5 or $(shell echo 1) and 'a' \"b\"?"
    for told in ({"QUESTION": question}, {}):
        arguments = [] if told else [f"QUESTION={question}"]
        done = make("baichuan-client", *arguments, "DRY_RUN=1", environment={**PLACES, **told})
        words = shlex.split(done.stdout)
        assert words[words.index("--question") + 1] == question
    assert "--question" not in make("baichuan-client", "DRY_RUN=1", environment=PLACES).stdout
