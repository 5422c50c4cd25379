"""A small self-written MMCU set in the benchmark's own layout, with the irregularities of the original.

Four domains in test/ and dev/: 医疗 has a sheet for every subject, 教育 a workbook for every subject. One answer column
is headed "B", answers have full-width letters, spaces, commas or a line end in them, cells are numbers or empty, one
row has no answer, one is blank, lock files lie beside the workbooks.
"""

from collections.abc import Sequence
from pathlib import Path

HEADING = ["题目", "A", "B", "C", "D", "答案"]
ANSWERS = ["A", "B", "C", "D", "AB", "ＡＣ", "B D", "A,B,C", "DB", "C\n"]
SUBJECTS = {"解剖学22题": 9, "病理学176题": 16, "医学影像学20题": 5}
OTHERS = {"法律": 14, "心理": 12, "教育_数学": 10, "教育_语文": 7}
SHOTS = 6


def question(subject: str, i: int) -> list:
    """A row; the answer goes round through ANSWERS, the right option is the subject's name."""
    options = [f"{letter}. 第{i}题的第{n}项" for n, letter in enumerate("ABCD", 1)]
    return [f"关于{subject}，第{i}题应当怎样回答？", *options, ANSWERS[i % len(ANSWERS)]]


def rows_of(subject: str, count: int) -> list[list]:
    """Ordinary rows and, in every subject, one with a number, one with a missing option and one with a letter word."""
    rows = [question(subject, i) for i in range(count)]
    rows[1][2], rows[2][4], rows[3][1] = 3, None, "A、DNA的复制\n发生在细胞核"
    return rows


def build_mmcu(folder: Path) -> int:
    """Write the set; returns how many questions have an answer."""
    rows = {subject: rows_of(subject, count) for subject, count in (SUBJECTS | OTHERS).items()}
    total = sum(map(len, rows.values()))
    rows["心理"].insert(4, ["这一题没有答案", "甲", "乙", "丙", "丁", None])
    rows["法律"].insert(5, [None] * 6)
    for part in ("test", "dev"):
        (folder / part).mkdir(parents=True)
        medical = {subject: rows[subject] for subject in SUBJECTS} if part == "test" else {"医疗": rows["解剖学22题"]}
        write_book(folder / part / "医疗.xlsx", medical)
        for subject in OTHERS:
            # an answer column headed B, and a second sheet that does not count
            heading = HEADING[:5] + ["B"] if subject == "教育_数学" else HEADING
            sheets = {"Sheet1": rows[subject] if part == "test" else rows_of(subject + "例", SHOTS), "Sheet2": []}
            write_book(folder / part / f"{subject}.xlsx", sheets, heading)
    for name in ("._医疗.xlsx", ".~法律.xlsx", "~$心理.xlsx"):
        (folder / "test" / name).write_bytes(b"\0\5\x16\7 no workbook")
    return total


def write_book(path: Path, sheets: dict[str, Sequence[Sequence]], heading: Sequence[str] = HEADING) -> None:
    """A workbook with these sheets."""
    from openpyxl import Workbook

    book = Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in [heading, *rows]:
            sheet.append(row)
    book.save(path)
