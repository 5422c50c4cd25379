"""Fetch the MMCU data from a hub, or take note of a folder that has it, and count it: `make mmcu-download`.

    python -m llm_code.llm_evaluation.mmcu_download --dataset_id Besteasy/MMCU --revision main --source huggingface \\
        --data_dir DIR

Writes DIR/test/*.xlsx and DIR/dev/*.xlsx, from workbooks or from zip archives on the hub. Where they are there already,
under DIR or below it, nothing is fetched. Exit 2 when files or counts are not those of the benchmark.
"""

import argparse
import io
import os
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from finetune.errors import UserError, run_main
from finetune.text_files import write_aside
from llm_code.llm_evaluation.mmcu_data import data_hash, find_data_dir, read_questions, workbooks

# https://arxiv.org/abs/2304.12986: questions of each domain, and subjects of each
QUESTIONS = {"医疗": 2819, "法律": 3695, "心理": 2000, "教育": 3331}
SUBJECTS = {"医疗": 15, "法律": 1, "心理": 1, "教育": 8}
PARTS = ("test", "dev")
LICENCE = "MMCU is licensed CC BY-NC-SA 4.0: not for commercial use, changes under the same licence."
UNFINISHED = ".download"
LANGUAGE_BIT = 0x800  # of a zip entry whose name is UTF-8


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_id", required=True, help="owner/name on the hub")
    parser.add_argument("--revision", required=True, help="tag, branch or commit")
    parser.add_argument("--source", choices=("modelscope", "huggingface"), required=True, help="which hub")
    parser.add_argument("--data_dir", required=True, type=Path, help="where test/ and dev/ go, or lie already")
    return parser.parse_args()


def workbooks_of(path: PurePosixPath, content: bytes) -> Iterator[tuple[str, bytes]]:
    """(test/NAME.xlsx or dev/NAME.xlsx, content) of a downloaded file: a workbook, or an archive of workbooks."""
    if path.suffix == ".xlsx" and len(path.parts) > 1 and path.parts[-2] in PARTS and path.name[0] not in ".~":
        yield f"{path.parts[-2]}/{path.name}", content
    elif path.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry_name(entry))
                if name.suffix == ".xlsx":
                    yield from workbooks_of(name, archive.read(entry))


def entry_name(entry: zipfile.ZipInfo) -> str:
    """An entry's name; archives made on Windows store GBK, which zipfile takes for the code page of old PCs."""
    if entry.flag_bits & LANGUAGE_BIT:
        return entry.filename
    raw = entry.filename.encode("cp437")
    for encoding in ("utf-8", "gbk"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return entry.filename


def place(downloaded: Path, data_dir: Path) -> None:
    """Bring the workbooks of a download to their place. Raises UserError when it has none, or a broken archive."""
    found: dict[str, bytes] = {}
    for path in sorted(path for path in downloaded.rglob("*") if path.is_file()):
        try:
            found |= dict(workbooks_of(PurePosixPath(path.relative_to(downloaded).as_posix()), path.read_bytes()))
        except (zipfile.BadZipFile, RuntimeError) as error:
            raise UserError(f"{path.name}: expected a zip archive without a password, but {error}.") from None
    if not any(name.startswith("test/") for name in found):
        raise UserError(
            "the data set has no workbooks in a folder test/: expected the MMCU data. Check the data set id."
        )
    for name, content in found.items():
        aside = data_dir / UNFINISHED / "ready" / name
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
    for part in PARTS[::-1]:  # test/ last: it says that the data are there
        if (data_dir / UNFINISHED / "ready" / part).exists():
            (data_dir / UNFINISHED / "ready" / part).rename(data_dir / part)


def fetch(args: argparse.Namespace) -> None:
    """Download and check the archives or workbooks of the data set, and bring them to their place."""
    from finetune.hub_files import wrong_files
    from finetune.hubs import HUBS, explained

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub, folder = HUBS[args.source]("dataset", "MMCU_SOURCE"), args.data_dir / UNFINISHED / "files"
    print(f"-----> {hub.endpoint}: {args.dataset_id} {args.revision}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with explained(hub, args.dataset_id, args.revision):
        listed = hub.list_files(args.dataset_id, args.revision)
        wanted = [file for file in listed if file.path.endswith((".xlsx", ".zip"))]
        if not wanted:
            raise UserError(f"{args.dataset_id} has neither workbooks nor archives: expected the MMCU data.")
        hub.fetch(args.dataset_id, args.revision, [file.path for file in wanted], folder)
    for name, problem in wrong_files(folder, wanted, print).items():
        (folder / name).unlink(missing_ok=True)
        raise UserError(f"{name}: {problem}; removed. Run again.")
    shutil.rmtree(args.data_dir / UNFINISHED / "ready", ignore_errors=True)
    place(folder, args.data_dir)
    shutil.rmtree(args.data_dir / UNFINISHED)


def count(data_dir: Path) -> tuple[str, list[str]]:
    """What lies there in one line, and what differs from the benchmark."""
    questions, remarks = read_questions(data_dir)
    per_domain = Counter(question.domain for question in questions)
    per_domain.update(remark.split(".xlsx")[0].split("_")[0] for remark in remarks)
    subjects = Counter(domain for _, domain in {(question.subject, question.domain) for question in questions})
    problems = [
        f"{domain}: expected {QUESTIONS[domain]:,} questions of {SUBJECTS[domain]} subjects, "
        f"found {per_domain[domain]:,} of {subjects[domain]}"
        for domain in QUESTIONS
        if (per_domain[domain], subjects[domain]) != (QUESTIONS[domain], SUBJECTS[domain])
    ]
    missing = {path.name for path in workbooks(data_dir / "test")} - {path.name for path in workbooks(data_dir / "dev")}
    problems += [f"dev/{name}: expected worked examples, found no such file" for name in sorted(missing)]
    several = sum(len(question.answer.strip()) > 1 for question in questions)
    line = f"{per_domain.total():,} questions of {subjects.total()} subjects, {several:,} with several letters"
    return line, remarks + problems if problems else []


def main() -> None:
    """Fetch what is not there, then count."""
    args = parse_args()
    try:
        data_dir = find_data_dir(args.data_dir)
        print(f"already there: {data_dir}")
    except UserError:
        data_dir = None
    if data_dir is None:
        fetch(args)  # outside the handler: its errors are not caused by what was missing
        data_dir = find_data_dir(args.data_dir)
    line, problems = count(data_dir)
    print(line, f"sha256 of all workbooks {data_hash(data_dir)}", LICENCE, sep="\n")
    write_aside(data_dir / "LICENCE.txt", LICENCE + "\n")
    if problems:
        raise UserError(
            f"{data_dir} is not the whole benchmark (it can be used, but not compared): move it away, or set "
            "MMCU_DATA_DIR to an empty place, and run again for all of it.\n" + "\n".join(problems)
        )


if __name__ == "__main__":
    run_main(main)
