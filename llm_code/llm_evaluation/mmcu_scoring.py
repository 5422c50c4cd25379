"""What an answer says, in the benchmark's own reading and in a strict one. Pure functions of text.

official: as the benchmark's script, bit for bit: "Answer: B" is read as A, and "BA" is not "AB".
strict:   the letters as a set, from a statement such as 故选 or 答案是 before anything else; what says nothing clear is
          invalid, the empty string.
"""

import re
import unicodedata

LETTERS = "ABCD"
NO_ANSWER = "未成功回答"  # the benchmark's word for an answer without a letter
OPENING = r"[\"'“”‘’(\[【*\s]*"
RUN = r"[A-D]++(?![A-Za-z0-9])"  # not part of a word or a number
LISTED = r"(?:[ ,、;/和及与]|以及|and)"
# A.B.C is a list, but "A.B细胞" is option A and its text
DOTTED = r"\.(?=(?>[A-D](?:\.[A-D])*)(?![A-Za-z0-9\u4e00-\u9fff]))"
BETWEEN = rf"(?:{LISTED}{{1,4}}|[)\]】]{LISTED}{{,3}}[(\[【]|\*\*{LISTED}{{,3}}\*\*|{DOTTED})"
WRONG = r"\s*(?:选?项)?[都均]?\s*(?:不|错)"
# a list of letters as a whole or not at all: a part of it would be another answer; not one that is called wrong
GROUP = rf"((?>{RUN}(?:{BETWEEN}{RUN})*))(?!{WRONG})"
CHOICE = rf"(?:{GROUP}|({RUN})(?=,\s*{RUN}{WRONG}))"  # in "选A，B不对" the list ends before what is called wrong
STATED = re.compile(
    rf"(?:答案|正确选项|正确的选项|(?i:answer))(?:的?(?:序号|选项))?\s*(?:应该|应当|应)?\s*(?:是|为|选|:|=|is\b)*\s*{OPENING}{CHOICE}"
    rf"|(?<!不)(?:故|应|应当|应该|所以|因此),?\s*(?:本题)?选择?(?:是|为|:)*\s*{OPENING}{CHOICE}"
)
CHOSEN = re.compile(rf"(?<![不没别勿未])选择?(?:是|为|:)*\s*{OPENING}{CHOICE}")
BETWEEN_ALONE = r"[\s,、;/.和及与()\[\]【】*]*"
FIRST_LINE = re.compile(rf"[\s(\[【*\"'“]*([A-Da-d](?:{BETWEEN_ALONE}[A-Da-d])*)[\s)\]】*\"'”.。、,:]*")
AT_START = re.compile(rf"{OPENING}{GROUP}(?![\u4e00-\u9fff])")
ALONE = re.compile(rf"(?:(?<![A-Za-z0-9\u4e00-\u9fff])|(?<=[选项是为择案号])){GROUP}")


def official_gold(answer: str) -> str:
    """The answer cell without spaces (half and full width) and commas, full-width letters made plain."""
    return answer.replace(" ", "").translate(str.maketrans("ＡＢＣＤ", LETTERS)).replace("\u3000", "").replace(",", "")


def official_prediction(text: str) -> str:
    """The first run of one to four of ABCD that repeats none, punctuation taken away first; else 未成功回答."""
    for mark in "、.,;，":
        text = text.replace(mark, "")
    runs = re.findall("[ABCD]{1,4}", text)
    return next((run for run in runs if len(set(run)) == len(run)), NO_ANSWER)


def strict_gold(answer: str) -> str:
    """The letters of an answer cell, each once, in order."""
    return _ordered(unicodedata.normalize("NFKC", answer))


def strict_prediction(text: str) -> str:
    """The letters an answer chooses, in order; empty when it chooses none or more than one reading is left.

    By preference: a first line of letters alone; the last 答案是/故选/应选/Answer:; the last 选; letters at the very
    beginning, as in "A. ..."; the only letters in the text.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    if not text:
        return ""
    if match := FIRST_LINE.fullmatch(text.splitlines()[0]):
        return _ordered(match[1].upper())
    for pattern in (STATED, CHOSEN):
        if matches := list(pattern.finditer(text)):
            return _ordered(next(group for group in matches[-1].groups() if group))
    if match := AT_START.match(text):
        return _ordered(match[1])
    found = {_ordered(match[1]) for match in ALONE.finditer(text)}
    return found.pop() if len(found) == 1 else ""


def _ordered(text: str) -> str:
    return "".join(letter for letter in LETTERS if letter in text)
