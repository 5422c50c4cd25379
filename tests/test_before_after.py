"""The page before and after fine-tuning: its parts by hand, then the real program over two results."""

import json
import re
import sys
from pathlib import Path

import pytest

from finetune import before_after, report
from finetune.answer_way import read_way
from finetune.contamination import overlap
from finetune.errors import UserError
from finetune.identity import adapter_fingerprint
from finetune.page import Heading, Picture, Table, Text, html_page, markdown
from finetune.paired_scores import by_domain, check_same_rows, difference, read_records, samples, verdict
from finetune.report_blocks import environment_blocks, said, score_row
from finetune.rows import Row, Turn
from tests.adapters import make_adapter


def graded(results, domain=None):
    """Records with these results, true or false or a BLEU."""
    key = "correct" if isinstance(results[0], bool) else "bleu"
    extra = {"domain": domain} if domain else {}
    return [
        {"row": i, "prompt": f"第{i}问", "gold": "对", "predicted": f"答{score}", key: score} | extra
        for i, score in enumerate(results)
    ]


def test_differences_by_hand():
    before, after = graded([False] * 9 + [True]), graded([True] * 9 + [False])
    found = difference("test", before, after)
    assert (found.before, found.after, found.change) == pytest.approx((0.1, 0.9, 0.8))
    assert found.p == pytest.approx(2 * (1 + 10) / 1024) and verdict(found) == "better"
    assert verdict(difference("test", after, before)) == "worse"
    noise = difference("test", graded([True, False] * 5), graded([False, True] * 4 + [True, True]))
    assert noise.change == pytest.approx(0.1) and verdict(noise) == "no difference beyond chance"
    same = difference("test", before, before)
    assert same.p == 1 and verdict(same) == "no difference beyond chance"
    scores = [i / 100 for i in range(30)]
    gain = difference("bleu", graded(scores), graded([score + 0.01 for score in scores]))
    assert gain.change == pytest.approx(0.01) and gain.test == "paired bootstrap" and verdict(gain) == "better"


def test_each_interval_is_of_its_own_answers():
    found = difference("test", graded([False] * 9 + [True]), graded([True] * 9 + [False]))
    # The roots of (p - 0.1)^2 = z^2 p (1 - p) / 10, and the same from the other end.
    assert found.before_95 == pytest.approx((0.017876, 0.404150), abs=1e-6)
    assert found.after_95 == pytest.approx((1 - 0.404150, 1 - 0.017876), abs=1e-6)
    low, high = graded([i / 1000 for i in range(30)]), graded([0.9 + i / 1000 for i in range(30)])
    found = difference("bleu", low, high)
    assert 0 < found.before_95[0] < found.before_95[1] < 0.03 and 0.9 < found.after_95[0] < found.after_95[1] < 0.93


def test_a_difference_below_what_is_shown_is_none():
    found = difference("BLEU", graded([1e-80] * 40), graded([0.0] * 40))
    assert found.p == 1 and verdict(found) == "no difference beyond chance"
    assert score_row(found, "bleu")[6] == "+0.0000"
    slight = difference("BLEU", graded([0.00004] * 40), graded([0.00001] * 40))
    assert score_row(slight, "bleu")[6] == "+0.0000", "no -0.0000"


def test_an_answer_that_was_not_read_is_shown_as_written():
    assert said({"predicted": "AB", "answer": "选AB"}) == "AB"
    assert said({"predicted": "", "answer": "不知道\n"}) == "nothing clear in: 不知道"
    assert said({"predicted": " "}) == "(empty)"


def test_settings_of_adapters_are_not_told_of_full_training():
    report = {"versions": {}, "git_commit": "a", "config_file": "b", "identity": {"lora_rank": 64, "seed": 1}}
    for method, words in (
        ("all parameters, without DeepSpeed", ["seed"]),
        ("QLoRA, 4-bit NF4 base", ["lora rank", "seed"]),
    ):
        table = environment_blocks(report | {"method": method})[1]
        assert [name for name, _ in table.rows][2:] == words


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"num_train_epochs": 2.0, "max_steps": -1}, ["num train epochs", "2.0"]),
        ({"num_train_epochs": 2.0, "max_steps": 300}, ["max steps", "300"]),
    ],
)
def test_the_length_of_the_training_is_told(config, shown):
    report = {"versions": {}, "git_commit": "a", "config_file": "b", "identity": {"seed": 1}, "method": "QLoRA"}
    assert environment_blocks(report | {"config": config})[1].rows[-1] == shown


def test_the_title_names_base_model_and_run(tmp_path):
    report = {"config": {"model_name_or_path": "/models/Baichuan2-7B-Chat-native"}}
    assert before_after.model_name(report, tmp_path / "output") == "Baichuan2-7B-Chat-native, output"
    assert before_after.model_name({}, tmp_path / "output") == "output"


def test_models_asked_in_two_ways_are_not_compared(run, tmp_path):
    folders = [tmp_path / name for name in ("base", "tuned")]
    for folder, answer in zip(folders, ("generate", "likelihood"), strict=True):
        folder.mkdir()
        write(folder / "answers.jsonl", graded([True] * 3))
        (folder / "report.json").write_text(json.dumps({"config": {"answer": answer, "ntrain": 0}}))
    paths = [folder / "answers.jsonl" for folder in folders]
    with pytest.raises(UserError, match="MMCU: expected both models asked in one way, found answers written text and"):
        run(["MMCU", *paths])
    # Evaluated again as advised: the run that stands keeps its place, the new one goes into a folder there.
    again = folders[0] / "answer_likelihood"
    again.mkdir()
    write(again / "answers.jsonl", graded([True, False, True]))
    (again / "report.json").write_text(json.dumps({"config": {"answer": "likelihood", "ntrain": 0}}))
    assert f"MMCU: {again / 'answers.jsonl'} is taken" in run(["MMCU", *paths]).err
    assert "| MMCU | 3 | 66.7 " in (tmp_path / "page" / "report.md").read_text()
    (folders[1] / "report.json").write_text(json.dumps({"config": {"answer": "service", "ntrain": 0}}))
    assert "written" in run(["MMCU", *paths]).out
    (tmp_path / "bleu.json").write_text(json.dumps({"generation": {"config": {"answer": "engine", "top_p": 1.0}}}))
    assert read_way(tmp_path / "bleu.jsonl") == {"answers": "written text", "top_p": 1.0}
    (tmp_path / "rows_metrics.json").write_text(json.dumps({"config": {"mode": "likelihood"}}))
    assert read_way(tmp_path / "rows.jsonl") == {"answers": "likelihood"} and read_way(tmp_path / "no.jsonl") == {}


def test_domains_are_adjusted_for_their_number():
    before = graded([False] * 6, "法律") + graded([False] * 6, "心理")
    after = graded([True] * 6, "法律") + graded([False] * 6, "心理")
    law, mind = by_domain("MMCU", before, after)
    assert (law.name, law.p) == ("MMCU, 法律", pytest.approx(2 * 2 / 64)) and mind.p == 1
    assert by_domain("other", graded([True]), graded([True])) == []


def test_records_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="same questions for both models, found 2 and 3"):
        check_same_rows(graded([True] * 2), graded([True] * 3), "test")
    with pytest.raises(UserError, match="found 2 and 2 that differ"):
        check_same_rows(graded([True] * 2), graded([0.5] * 2), "test")
    with pytest.raises(UserError, match="found 2 and 2 that differ"):
        check_same_rows(graded([True] * 2), [record | {"gold": "错"} for record in graded([True] * 2)], "test")
    check_same_rows([{"row": 0, "prompt": "第0问", "gold": "对"}], graded([True]), "test")
    for text in ("", "{}\n", "nothing\n", "3\n"):
        (tmp_path / "records.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"records.jsonl: expected the records"):
            read_records(tmp_path / "records.jsonl")
    pairs = samples(graded([True] * 50), graded([False] * 50), 8)
    rows = [first["row"] for first, _ in pairs]
    assert len(set(rows)) == 8 and rows == sorted(rows) and rows != list(range(8))


def test_records_are_read_line_feed_by_line_feed(tmp_path):
    records = [row | {"predicted": f"一\u2028二\u2029三{chr(0x85)}四\r五"} for row in graded([True, False])]
    assert read_records(Path(write(tmp_path / "records.jsonl", records))) == records


def conversation(line, human, assistant):
    return Row(line, (Turn(human, assistant),))


def test_contamination_by_hand():
    template = "请判断下面两句话的意思是否相同："
    train = [conversation(i, f"{template}{i}甲乙丙", "不相同") for i in range(1, 13)]
    train += [conversation(20, "今天晚上失眠到三点怎么办才好呢", "先起来走一走再回到床上去吧")]
    questions = [
        "今天晚上 失眠到三点怎么办才好呢",  # the same but for a space
        "我今天晚上失眠到三点怎么办才好呢我",  # holds 13 of its characters
        "ＡＢＣ" + template,  # the template alone
        template + "13甲乙丙丁戊己庚辛壬癸",  # the template and 13 characters of its own
        "别的问题",
        "又一个问题",
    ]
    answers = [
        "休息",
        "休息",
        "相同",
        "相同",
        "好的，先起来走一走再回到床上去吧",
        "先起来走一走再回到床上去",
    ]  # 12 characters
    found = overlap(train, questions, answers)
    assert (found.total, found.exact, found.shared) == (6, (0,), (0, 1, 4))
    assert [(i, line) for i, line, _ in found.examples] == [(0, 20), (1, 20), (4, 20)]
    assert found.examples[1][2] == "今天晚上失眠到三点怎么办才"


def test_a_page_in_both_forms(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG data")
    blocks = [
        Heading("标题 <1>", 1),
        Text("a & b"),
        Table(["x", "y"], [["1|2", "<b>\n3"], ["< 0.001\r\n4\r5", "</b><!--"]]),
    ]
    blocks.append(Picture(tmp_path / "a.png", "curve"))
    text = markdown(blocks, tmp_path / "pages")
    rows = "| 1\\|2 | &lt;b><br>3 |\n| < 0.001<br>4<br>5 | &lt;/b>&lt;!-- |"
    assert text == f"# 标题 <1>\n\na & b\n\n| x | y |\n| --- | --- |\n{rows}\n\n![curve](../a.png)\n"
    page = html_page(blocks)
    assert "<h1>标题 &lt;1&gt;</h1>" in page and "<p>a &amp; b</p>" in page and "<td>&lt;b&gt;\n3</td>" in page
    assert '<td class="short">1|2</td>' in page and "overflow-wrap:anywhere" in page, "long words widen no column"
    assert 'src="data:image/png;base64,iVBORyBkYXRh"' in page


@pytest.fixture
def trained(tmp_path):
    """What a finished training leaves in its output folder, and the file it was trained on."""
    folder = tmp_path / "trained"
    folder.mkdir()
    history = [{"step": step, "loss": 2 / step, "learning_rate": 1e-4} for step in (1, 2, 3)]
    report.draw_losses(history, folder / "loss.png", "trained")
    numbers = {"updates": 3, "updates_planned": 3, "seconds": 3725.4, "tokens": 5000, "supervised_tokens": 700}
    numbers |= {"tokens_per_second": 1.3, "cost": 2.92, "devices": "1 x cpu", "history": history}
    about = {"method": "qlora", "status": "finished", "identity": {"base_model": "abc"}, "config_file": "c.json"}
    about |= {"git_commit": report.git_commit(), "versions": report.versions()}
    (folder / "train_report.json").write_text(json.dumps(numbers | about))
    train_file = tmp_path / "train.jsonl"
    row = {"conversation": [{"human": "第0问", "assistant": "对"}]}
    train_file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder, train_file


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys, trained, tmp_path):
    def run(*scores):
        words = [
            "--title",
            "Tiny",
            "--train_dir",
            trained[0],
            "--train_file",
            trained[1],
            "--output_dir",
            tmp_path / "page",
        ]
        words += [word for score in scores for word in ("--score", *score)]
        monkeypatch.setattr(sys, "argv", ["before_after", *map(str, words)])
        before_after.main()
        return capsys.readouterr()

    return run


def test_the_page_of_a_model(run, tmp_path):
    task = [write(tmp_path / "a.jsonl", graded([False] * 9 + [True])), write(tmp_path / "b.jsonl", graded([True] * 10))]
    mmcu = [
        write(tmp_path / f"mmcu_{name}.jsonl", graded([True] * right + [False] * 4, "法律") + graded([True], "心理"))
        for name, right in (("a", 5), ("b", 5))
    ]
    missing = tmp_path / "missing.jsonl"
    done = run(["task", *task], ["MMCU", *mmcu], ["BLEU", missing, task[0]])
    assert f"BLEU is left out: {missing} missing." in done.err
    page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    # 9 against 0 discordant rows: 2/512, times two tests on the page
    assert "| task | 10 | 10.0 % |" in page and "0.00781 (McNemar) | better |" in page
    assert "| MMCU | 10 | 60.0 % |" in page and "1 (McNemar) | no difference beyond chance |" in page
    assert "| MMCU, 法律 | 9 |" in page and f"BLEU is left out: {missing}" in page
    assert "| time | 1:02:05 |" in page and "| cost | 2.92 yuan |" in page and "![training curve](loss.png)" in page
    assert "| task | 10 | 1 | 0 |" in page, "the first question stands in the training file"
    html = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/png;base64,', html)) == 2 and 'src="' not in html.replace('src="data:', "")
    assert "better" in html and "第0问" in html


def test_a_page_without_scores_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="before and after, but task is left out.* Evaluate the base model"):
        run(["task", tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_scores_of_other_weights_than_the_trainings_are_told(run, trained, tiny_qwen, tmp_path):
    final = make_adapter(tiny_qwen, trained[0] / "final")
    (final / "complete.json").write_text("{}")
    paths = [write(tmp_path / f"{name}.jsonl", graded([right] * 10)) for name, right in (("a", False), ("b", True))]
    about = tmp_path / "b_metrics.json"
    for there, words in ((adapter_fingerprint(final), 0), ("922053c2" * 8, 1), (None, 0)):
        about.write_text(json.dumps({"config": {"mode": "generate", "model": "base", "adapter": there}}))
        told = run(["task", *paths]).err
        assert told.count("answers are of other weights (922053c2) than") == words
        page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
        assert page.count("they say nothing about this training") == words
    # A service tells a digest of weights and numbers' format together, which no folder has.
    about.write_text(json.dumps({"config": {"service": "http://127.0.0.1:1", "model": "final", "weights": "922053c2"}}))
    assert "other weights" not in run(["task", *paths]).err
