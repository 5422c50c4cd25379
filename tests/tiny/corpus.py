"""Texts that the tiny base model is pretrained on: the bundled data's word lists in other wordings than the data's.

The base learns the language of the word lists and what a paraphrase is. It sees neither the prompts nor the pairs of the
fine-tuning task, and its answer words only as sounds to repeat, so that fine-tuning has something to teach.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import qwen_qlora.data
from qwen_qlora.data.keywords import draw_example
from qwen_qlora.data.text_matching.frames import draw_meaning, render
from qwen_qlora.data.text_matching.pairs import WORDINGS, Pair, draw_pair

DATA_DIR = Path(qwen_qlora.data.__file__).parent
# How the two sentences are shown (marked, quoted, joined), how the question is put ({same} and {different} are the
# verdicts), and the verdicts.
MARKS = (
    ("甲：", "乙："), ("1. ", "2. "), ("（一）", "（二）"), ("上句：", "下句："), ("A=", "B="), ("左：", "右："), ("先说", "又说"), ("原文：", "译文："), ("前者：", "后者："),
    ("", ""), ("①", "②"), ("头一句：", "第二句："), ("X. ", "Y. "), ("他讲", "她讲"),
)  # fmt: skip
QUOTES = (("", ""), ("「", "」"), ("“", "”"), ("<", ">"), ("【", "】"), ("《", "》"))
JOINTS = ("\n", "；", " / ", "，", " 对照 ", "和", " | ", "与", "……")
ASKED = (
    "看看这一对能不能互换，写“{same}”或“{different}”。", "说说二者的关系。", "给出判定，形式为“判定：{same}”或“判定：{different}”。", "两边说的内容如何？",
    "意思对得上写{same}，对不上写{different}。", "结论只能是“结论：{same}”或“结论：{different}”。", "请下断语：{same}/{different}。", "你怎么看？", "这一对讲得通吗？填{same}或{different}。",
    "以上内容请归类为{same}、{different}之一。", "二选一：{same}、{different}。",
)  # fmt: skip
VERDICTS = (
    ("同义", "异义"), ("没有两样", "大有出入"), ("吻合", "不吻合"), ("重复", "有别"), ("等价", "不等价"), ("行得通", "行不通"), ("相符", "不相符"), ("一回事", "两回事"),
    ("对", "错"), ("真", "假"), ("可以互换", "不可互换"), ("有", "无"),
)  # fmt: skip
PREFIXES = {"判定": "判定：", "结论": "结论："}
SPOKEN = (
    "相同", "不相同", "相似", "不相似", "一致", "不一致", "是", "否", "答案：", "回答", "格式", "句子", "说法", "语义", "文本匹配",
)  # fmt: skip
TURN = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
CHAT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TURN


def bundled_prompts() -> set[str]:
    """Every human turn of the bundled text-matching files: what the pretraining text must not repeat."""
    files = sorted(DATA_DIR.glob("text_matching_data_*.jsonl"))
    rows = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return {json.loads(row)["conversation"][0]["human"] for row in rows}


def is_bundled(first: str, second: str, prompts: set[str]) -> bool:
    """Whether the pair, in either order, stands in one of the bundled rows."""
    filled = (w.prompt.format(a=a, b=b) for w in WORDINGS for a, b in ((first, second), (second, first)))
    return any(text in prompts for text in filled)


def _fresh_pair(rng: random.Random, prompts: set[str]) -> Pair:
    pair = draw_pair(rng)
    while is_bundled(pair.first, pair.second, prompts):
        pair = draw_pair(rng)
    return pair


def _show(pair: Pair, rng: random.Random) -> str:
    (first, second), (left, right) = rng.choice(MARKS), rng.choice(QUOTES)
    return f"{first}{left}{pair.first}{right}{rng.choice(JOINTS)}{second}{left}{pair.second}{right}"


def _verdict(rng: random.Random, prompts: set[str]) -> tuple[str, str]:
    """A pair, a question about it, and the verdict behind the prefix that the question names."""
    pair, (same, different) = _fresh_pair(rng, prompts), rng.choice(VERDICTS)
    asked = rng.choice(ASKED)
    prefix = next((prefix for word, prefix in PREFIXES.items() if word + "：" in asked), "")
    parts = [_show(pair, rng), asked.format(same=same, different=different)]
    if rng.random() < 0.5:
        parts.reverse()
    return "\n".join(parts), prefix + (same if pair.same else different)


def _echo(rng: random.Random) -> tuple[str, str]:
    """A request to say some words again: it gives every word of the vocabulary a use, without a meaning."""
    said = "".join(rng.choice(SPOKEN) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.5:
        said = said + render(draw_meaning(rng), rng)
    return "跟我念：" + said, said


def draw_document(rng: random.Random, prompts: set[str]) -> tuple[str, str]:
    """(text, ending): one document; the ending is the part that only an understanding of the text predicts."""
    kind = rng.random()
    if kind < 0.8:
        question, answer = _verdict(rng, prompts)
    elif kind < 0.86:
        meaning = draw_meaning(rng)
        question, answer = "换个说法：" + render(meaning, rng), render(meaning, rng)
    elif kind < 0.95:
        question, answer = _echo(rng)
    else:
        prompt, answer = draw_example(rng)
        question = prompt.replace("关键词", "要点")
    return CHAT.format(question=question), answer + "<|im_end|>\n"


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of documents."""
    rng, prompts = random.Random(seed), bundled_prompts()
    while True:
        yield draw_document(rng, prompts)
