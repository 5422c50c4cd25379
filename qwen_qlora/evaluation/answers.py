"""The answers a prompt allows, found from the row itself, and what a prediction says in their terms.

Text-matching rows ask one yes/no question in several wordings: 相同/不相同, 相似/不相似, 是/否,
each perhaps behind 答案：.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

POSITIVE, NEGATIVE, INVALID = "same", "different", "invalid"
# (says the two sentences match, says they do not); for a word in two pairs see answers_for
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
# where words of other pairs stand inside common words
ALONE = {"是": "是(?!否)", "否": "(?<![是能可与])否(?![则定认])", "错": "(?<![不没])错(?!误)"}
BETWEEN = r"(?:\W{1,3}|\W{0,3}(?:或者?|还是|和|与)\W{0,3})"
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


def answers_for(gold: str, prompt: str = "", used: Collection[str] = ()) -> Answers | None:
    """The answers valid for a row; None when its gold answer is none of them, or no answer of a known pair.

    Which negative word stands beside the positive one must not depend on this row's gold answer, or the pair would tell
    it: the words `used` as gold answers anywhere in the file decide, then the prompt, then the order of PAIRS.

    >>> answers_for("答案：不相似").texts()
    ['答案：相似', '答案：不相似']
    """
    word = bare_word(gold)
    positives = {positive for positive, negative in PAIRS if word in (positive, negative)}
    related = [pair for pair in PAIRS if pair[0] in positives]
    possible = [pair for pair in related if pair[1] in used] or related
    listed = (pair for pair in possible if _listed(pair).search(prompt))
    named = (pair for pair in possible if all(re.search(_not_inside(w, pair), prompt) for w in pair))
    pair = next(chain(listed, named, possible), None)
    if pair is None or word not in pair:
        return None
    before, after = gold[: gold.rindex(word)], gold[gold.rindex(word) + len(word) :]
    return Answers(before + pair[0] + after, before + pair[1] + after)


def _listed(pair: tuple[str, str]) -> re.Pattern[str]:
    """Both words one after the other, as in 是或不是 and “是”/“不是”: sentences to compare rarely do that."""
    positive, negative = (_not_inside(word, pair) for word in pair)
    return re.compile(f"{positive}{BETWEEN}{negative}|{negative}{BETWEEN}{positive}")


def _not_inside(word: str, pair: tuple[str, str]) -> str:
    """Pattern of a word where it is not part of a longer one: 相同 stands in 不相同, 否 in 是否, unnamed."""
    negation = pair[1].removesuffix(word) if pair[1] != word and pair[1].endswith(word) else ""
    return (f"(?<!{re.escape(negation)})" if negation else "") + ALONE.get(word, re.escape(word))


def keywords(text: str) -> set[str]:
    """The items of an answer that lists keywords with 、 between them."""
    return {item for part in text.split("、") if (item := normalise(part))}
