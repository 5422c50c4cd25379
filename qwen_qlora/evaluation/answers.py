"""The answers a prompt allows, found from the row itself, and what a prediction says in their terms.

Text-matching rows ask one yes/no question in several wordings: 相同/不相同, 相似/不相似, 是/否,
each perhaps behind 答案：.
"""

import re
from dataclasses import dataclass

POSITIVE, NEGATIVE, INVALID = "same", "different", "invalid"
# (says the two sentences match, says they do not); a word in two pairs is decided by the prompt, else by the first pair
PAIRS = (
    ("相同", "不相同"),
    ("相同", "不同"),
    ("相似", "不相似"),
    ("一致", "不一致"),
    ("等价", "不等价"),
    ("匹配", "不匹配"),
    ("同义", "不同义"),
    ("是", "否"),
    ("是", "不是"),
    ("对", "错"),
    ("对", "不对"),
    ("能", "不能"),
    ("有", "没有"),
    ("yes", "no"),
)
PREFIX = re.compile(r"^(?:[^：:\n]{1,12}[：:]\s*)?")
CLOSING = " \t\r\n\u3000。．.！!，,；;、"


@dataclass(frozen=True)
class Answers:
    """The two answers of one prompt, complete with the gold answer's prefix and closing mark."""

    positive: str
    negative: str

    def texts(self) -> list[str]:
        """Both candidates, the positive one first."""
        return [self.positive, self.negative]

    def class_of(self, text: str) -> str:
        """`same`, `different`, or `invalid` for anything that is neither of this prompt's two words."""
        word = bare_word(text)
        return {bare_word(self.positive): POSITIVE, bare_word(self.negative): NEGATIVE}.get(word, INVALID)


def normalise(text: str) -> str:
    """Surrounding white space and closing punctuation (half or full width) removed; nothing else is forgiven."""
    return text.strip().rstrip(CLOSING)


def bare_word(text: str) -> str:
    """A normalised answer without a short prefix such as 答案：."""
    text = normalise(text)
    return text[PREFIX.match(text).end() :]


def answers_for(gold: str, prompt: str = "") -> Answers | None:
    """The answers valid for a row with this gold answer; None when it is no answer of a known pair.

    >>> answers_for("答案：不相似").texts()
    ['答案：相似', '答案：不相似']
    """
    word = bare_word(gold)
    fitting = [pair for pair in PAIRS if word in pair]
    if not fitting:
        return None
    before, after = gold[: gold.rindex(word)], gold[gold.rindex(word) + len(word) :]
    named = (pair for pair in fitting if all(re.search(_not_inside(w, pair), prompt) for w in pair))
    positive, negative = next(named, fitting[0])
    return Answers(before + positive + after, before + negative + after)


def _not_inside(word: str, pair: tuple[str, str]) -> str:
    """Pattern of a word where it is not part of the pair's longer word: 相同 stands in 不相同 without being named."""
    negation = pair[1].removesuffix(word) if pair[1] != word and pair[1].endswith(word) else ""
    return (f"(?<!{re.escape(negation)})" if negation else "") + re.escape(word)


def keywords(text: str) -> set[str]:
    """The items of an answer that lists keywords with 、 between them."""
    return {item for part in text.split("、") if (item := normalise(part))}
