"""Labelled sentence pairs that word overlap does not give away, and the prompts that ask about them.

A positive pair is two sentences of one meaning, a negative one two sentences of near-miss meanings. Of a few candidates
the positive pair with the *lowest* and the negative pair with the *highest* character overlap is preferred, so that
overlap alone says little about the label.
"""

import random
from dataclasses import dataclass

from qwen_qlora.data.text_matching.frames import draw_meaning, near_miss, render

CANDIDATES = 3


@dataclass(frozen=True)
class Pair:
    """Two sentences and whether they mean the same."""

    first: str
    second: str
    same: bool


@dataclass(frozen=True)
class Wording:
    """A prompt with {a} and {b}, and the answers for a matching and a non-matching pair."""

    prompt: str
    same: str
    different: str


WORDINGS = (
    Wording("判断下面两个句子的意思是否相同，回答“相同”或“不相同”。\n句子一：{a}\n句子二：{b}", "相同", "不相同"),
    Wording("“{a}”和“{b}”这两句话的语义相似吗？请回答相似或不相似。", "相似", "不相似"),
    Wording(
        "句子1：{a}\n句子2：{b}\n以上两句话的意思一致吗？请按“答案：一致”或“答案：不一致”的格式作答。",
        "答案：一致",
        "答案：不一致",
    ),
    Wording("请比较两个说法讲的是不是同一件事，只答“是”或“否”。\n说法A：{a}\n说法B：{b}", "是", "否"),
    Wording("文本匹配：{a} || {b}\n请输出“答案：相同”或“答案：不相同”。", "答案：相同", "答案：不相同"),
)


def overlap(first: str, second: str) -> float:
    """Jaccard index of the two sets of characters, 0..1."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b)


def draw_pair(rng: random.Random) -> Pair:
    """A random pair, positive half of the time; never the same string twice."""
    same = rng.random() < 0.5
    candidates = []
    while len(candidates) < CANDIDATES:
        meaning = draw_meaning(rng)
        first, second = render(meaning, rng), render(meaning if same else near_miss(meaning, rng), rng)
        if first != second:
            candidates.append(Pair(first, second, same))
    candidates.sort(key=lambda pair: overlap(pair.first, pair.second), reverse=not same)
    return candidates[0] if rng.random() < 0.5 else rng.choice(candidates)


def draw_pairs(count: int, rng: random.Random, exclude: frozenset[frozenset[str]] = frozenset()) -> list[Pair]:
    """`count` distinct pairs; `exclude` holds pairs of sentences (in either order) that must not appear."""
    pairs, seen = [], set(exclude)
    while len(pairs) < count:
        pair = draw_pair(rng)
        key = frozenset((pair.first, pair.second))
        if key not in seen:
            seen.add(key)
            pairs.append(pair)
    return pairs
