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
EITHER = r"(?:或者|或|还是|\bor\b)"
LISTED = rf"(?:[ ,、;/+&和及与]|以及|and|{EITHER})"  # with "or", so that what leaves it open is read as a whole too
# A.B.C is a list, but "A.B细胞" is option A and its text
DOTTED = r"\.(?=(?>[A-D](?:\.[A-D])*)(?![A-Za-z0-9\u4e00-\u9fff]))"
# 选项 before each letter: behind a comma only where nothing but such letters follows, as in "选项A,选项B。"
NAMED = rf"(?:(?:[和及与、]|以及)选项|[,;]选项(?={RUN}(?:[,;、]选项{RUN})*\s*(?:[。.!\n]|$)))"
BETWEEN = (
    rf"(?:(?:选?项)?{LISTED}{{1,4}}|(?:选?项)?{NAMED}"
    rf"|[)\]】]{LISTED}{{,3}}[(\[【]|\*\*{LISTED}{{,3}}\*\*|{DOTTED})"
)
WRONG = r"\s*(?:选?项)?[都均]?\s*(?:不|错)"
# a list of letters as a whole or not at all: a part of it would be another answer
LIST = rf"(?>{RUN}(?:{BETWEEN}{RUN})*)"
GROUP = rf"({LIST})(?!{WRONG})"  # not one that is called wrong
NOT_THOSE = rf",?\s*不(?:应该?|能)?[选是]择?\s*{OPENING}[A-D]"  # "选A不选B" calls A no wrong answer
# in "选A，B不对" the list ends before what is called wrong
CHOICE = rf"(?:{GROUP}|({LIST})(?={NOT_THOSE})|({RUN})(?=,\s*{RUN}{WRONG}))"
HAS = r"(?:只?有|包括|包含)"
STATED = re.compile(
    r"(?:答案|正确选项|正确的选项|(?i:answer))(?:的?(?:序号|选项))?[)\]】]?\s*(?:应该|应当|应)?\s*"
    rf"(?:是|为|选项?|{HAS}|:|=|is\b)*\s*{OPENING}{CHOICE}"
    rf"|(?<!不)(?:故|应|应当|应该|所以|因此),?\s*(?:本题)?选择?(?:是|为|:)*\s*{OPENING}{CHOICE}"
)
CHOSEN = re.compile(rf"(?<![不没别勿未])选择?(?:是|为|:)*\s*{OPENING}{CHOICE}")
BETWEEN_ALONE = r"[\s,、;/.和及与()\[\]【】*]*"
FIRST_LINE = re.compile(rf"[\s(\[【*\"'“]*([A-Da-d](?:{BETWEEN_ALONE}[A-Da-d])*)[\s)\]】*\"'”.。、,:]*")
AT_START = re.compile(rf"{OPENING}{GROUP}(?![\u4e00-\u9fff])")
ALONE = re.compile(rf"(?<![A-Za-z0-9]){GROUP}")
# what may stand before letters; any other word may be a name's beginning, as in 维生素A
BEFORE = re.compile(rf"(?:^|[^\u4e00-\u9fff]|[选项是为择案号即]|(?<![没不含]){HAS})$")
NOT_CHOSEN = re.compile(r"[不没别勿未](?:应该?|能)?选择?$")
ITEM = re.compile(r"\s*([A-D])\s*[.、:]\s*(?![A-D](?![A-Za-z0-9]))(.*\S)")
JUDGED = re.compile(r"正确|错误|不对|不符|不属于|不是|因为|由于|因此|无关")


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
    beginning, as in "A. ..."; the only letters in the text. "A或B" chooses none.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    if not text:
        return ""
    if match := FIRST_LINE.fullmatch(text.splitlines()[0]):
        return _ordered(match[1].upper())
    for pattern in (STATED, CHOSEN):
        if matches := list(pattern.finditer(text)):
            return _chosen(text, matches[-1])
    if match := AT_START.match(text):
        return _chosen(text, match)
    found = {_letters(match[1]) for match in ALONE.finditer(text) if _is_named(text[: match.start()])}
    return found.pop() if len(found) == 1 else ""


def _is_named(before: str) -> bool:
    """Whether letters behind this text are options, and not turned down."""
    return bool(BEFORE.search(before)) and not NOT_CHOSEN.search(before)


def _chosen(text: str, match: re.Match[str]) -> str:
    """The letters of a match; with their options' texts, as in "A. 甲;C. 丙", those of all items."""
    number = match.lastindex or 1
    letters = _letters(match[number])
    return _items(text[match.start(number) :]) or letters if len(letters) == 1 else letters


def _items(text: str) -> str:
    """The letters of the two or more items that a text begins with, each a line or up to a semicolon.

    Empty where there are fewer, and where they may be an explanation: judged, or not in the options' order.
    """
    letters = ""
    for part in re.split(r"[\n;]", text):
        item = ITEM.fullmatch(part)
        if not item:
            break
        if JUDGED.search(item[2]) or item[1] <= letters[-1:]:
            return ""
        letters += item[1]
    return letters if len(letters) > 1 else ""


def _letters(text: str) -> str:
    """The letters of a list; empty where it leaves open which."""
    return "" if re.search(EITHER, text) else _ordered(text)


def _ordered(text: str) -> str:
    return "".join(letter for letter in LETTERS if letter in text)
