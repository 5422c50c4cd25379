"""The MMCU workbooks as questions: test/*.xlsx, and dev/*.xlsx for worked examples.

Columns count by position (question, A, B, C, D, answer), since the headings are irregular. 医疗 has a sheet for every
subject, any other workbook one sheet and one subject. Cells are read as pandas.read_excel reads them, which the
benchmark's own script does: an empty cell, or a text such as NA, is missing and prints as nan; 3.0 is 3.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.partial_results import sha256_of

DOMAINS = ("医疗", "法律", "心理", "教育")
SHEETS_ARE_SUBJECTS = "医疗"
NUM_COLUMNS = 6
# pandas.read_excel's default na_values
MISSING = set(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|".split("|")
)
Cell = Any  # str, int, float, bool, datetime, or None for a missing cell


@dataclass(frozen=True)
class Question:
    """One row of a workbook; `number` counts the rows of its subject from 1."""

    domain: str
    subject: str
    number: int
    text: str
    options: tuple[Cell, ...]
    answer: str

    @property
    def row(self) -> str:
        """Its name in results."""
        return f"{self.subject}/{self.number}"


def find_data_dir(folder: str | Path) -> Path:
    """The folder that has test/ with workbooks: this one, or one below it. Raises UserError when there is none."""
    folder = Path(folder)
    below = sorted(path.parent for path in folder.rglob("test") if path.is_dir())
    places = [folder, *(path for path in below if not any(part[0] == "." for part in path.relative_to(folder).parts))]
    for place in places:
        if workbooks(place / "test"):
            return place
    raise UserError(
        f"{folder}: expected the MMCU data, a folder with test/*.xlsx in it. Run `make mmcu-download` first."
    )


def workbooks(folder: Path) -> list[Path]:
    """The .xlsx files of a folder by name, without the lock files and resource forks (._x, .~x, ~$x) beside them."""
    return sorted(path for path in folder.glob("*.xlsx") if path.name[0] not in ".~")


def data_hash(data_dir: Path) -> str:
    """Hex digest of all workbooks, names and contents."""
    digest = hashlib.sha256()
    for path in [*workbooks(data_dir / "test"), *workbooks(data_dir / "dev")]:
        digest.update(f"{path.parent.name}/{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def read_questions(data_dir: Path) -> tuple[list[Question], list[str]]:
    """All questions in the order of the benchmark's script, and a remark for each row without an answer.

    Such a row is left out; the benchmark's script would end the subject there. Raises UserError on a broken workbook.
    """
    questions, remarks = [], []
    for path in workbooks(data_dir / "test"):
        for title, rows in _read_sheets(path):
            subject = title if path.stem == SHEETS_ARE_SUBJECTS else path.stem
            for number, row in enumerate(rows, 1):
                if isinstance(row[-1], str):
                    questions.append(_question(path.stem, subject, number, row))
                else:
                    remarks.append(f"{path.name}, {title}: question {number} has no answer and is left out")
    return questions, remarks


def read_shots(data_dir: Path, ntrain: int) -> dict[str, list[Question]]:
    """The first `ntrain` worked examples of each workbook, by its name. Raises UserError when dev/ lacks one."""
    if not ntrain:
        return {path.stem: [] for path in workbooks(data_dir / "test")}
    shots = {}
    for test_path in workbooks(data_dir / "test"):
        path = data_dir / "dev" / test_path.name
        if not path.exists():
            raise UserError(f"{path}: expected worked examples for --ntrain {ntrain}, found no such file.")
        rows = _read_sheets(path)[0][1][:ntrain]
        if len(rows) < ntrain:
            raise UserError(f"{path}: expected {ntrain} worked examples (--ntrain, MMCU_NTRAIN), found {len(rows)}.")
        shots[path.stem] = [_question(path.stem, path.stem, number, row) for number, row in enumerate(rows, 1)]
    return shots


def stem_of(question: Question) -> str:
    """Name of the workbook a question stands in, which is also that of its worked examples."""
    return SHEETS_ARE_SUBJECTS if question.domain == SHEETS_ARE_SUBJECTS else question.subject


def stratified(questions: Sequence[Question], limit: int) -> list[Question]:
    """`limit` questions in their order, from every subject in proportion (at least one each if there are enough).

    Which ones is decided by a hash of the question's place, so a larger limit keeps most of a smaller one's choice.
    """
    if not limit or limit >= len(questions):
        return list(questions)
    quotas = _quotas(Counter(question.subject for question in questions), limit)
    chosen: set[str] = set()
    for subject, quota in quotas.items():
        rows = [question.row for question in questions if question.subject == subject]
        chosen.update(sorted(rows, key=lambda row: hashlib.sha256(row.encode()).digest())[:quota])
    return [question for question in questions if question.row in chosen]


def _quotas(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Seats by size: one for each subject where the limit allows it, the rest by largest remainder."""
    least = 1 if limit >= len(sizes) else 0
    total, rest = sum(sizes.values()), limit - least * len(sizes)
    exact = {name: rest * size / total for name, size in sizes.items()}
    quotas = {name: min(sizes[name], least + int(share)) for name, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: (int(exact[name]) - exact[name], name))
    while (open_seats := limit - sum(quotas.values())) > 0:
        for name in [name for name in by_remainder if quotas[name] < sizes[name]][:open_seats]:
            quotas[name] += 1
    return quotas


def _question(stem: str, subject: str, number: int, row: Sequence[Cell]) -> Question:
    return Question(
        stem.split("_")[0], subject, number, "nan" if row[0] is None else str(row[0]), tuple(row[1:5]), row[5]
    )


def _read_sheets(path: Path) -> list[tuple[str, list[list[Cell]]]]:
    """(title, rows below the heading) of every sheet that counts, rows without any content left out."""
    from zipfile import BadZipFile

    from openpyxl import load_workbook

    with warnings.catch_warnings():  # of styles and extensions that only matter to Excel
        warnings.simplefilter("ignore")
        try:
            book = load_workbook(path, data_only=True)
        except (BadZipFile, KeyError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: expected an Excel workbook, but {error}. Move {path.parent.parent} away and run "
                "`make mmcu-download` again."
            ) from None
    sheets = book.worksheets if path.stem == SHEETS_ARE_SUBJECTS else book.worksheets[:1]
    return [(sheet.title, _rows(path, sheet.title, sheet.iter_rows(values_only=True))) for sheet in sheets]


def _rows(path: Path, title: str, rows: Iterable[Sequence[Cell]]) -> list[list[Cell]]:
    table = [[_cell(value) for value in row] for row in rows]
    width = max((i + 1 for row in table for i, cell in enumerate(row) if cell is not None), default=0)
    if width != NUM_COLUMNS:
        raise UserError(
            f"{path}, sheet {title}: expected {NUM_COLUMNS} columns (question, A, B, C, D, answer), found {width}."
        )
    return [row[:NUM_COLUMNS] for row in table[1:] if any(cell is not None for cell in row)]


def _cell(value: Cell) -> Cell:
    if isinstance(value, str):
        return None if value in MISSING else value
    return int(value) if isinstance(value, float) and value.is_integer() else value
