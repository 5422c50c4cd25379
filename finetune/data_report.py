"""Check the rows of a fine-tuning before the card is paid for.

    python -m finetune.data_report --model_dir DIR --train_file F [--test_file F] --train_args_file JSON

Reads the files with the model's own tokenizer and chat format, prints counts, lengths, what the length limit does, the
balance of short answers and repetitions. Exit 2 with the first ten problems and their lines when a row leaves nothing
to learn, when rows contradict each other, or when test rows stand in the training file.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.arguments import parse_arguments as parse_experiment
from finetune.errors import UserError, run_main
from finetune.flag_types import positive
from finetune.rows import MAX_PROBLEMS_SHOWN, Row, read_rows

if TYPE_CHECKING:
    from finetune.conversation import EncodeReport, Sample

NUM_BUCKETS = 10
BAR_WIDTH = 40
MAX_LABELS = 12  # a file with more distinct last answers than this is not a classification task


def percentile(values: Sequence[int], share: float) -> int:
    """The nearest-rank percentile: the smallest value with at least `share` of the values at or below it."""
    ordered = sorted(values)
    return ordered[max(0, -(-round(share * 1_000_000) * len(ordered) // 1_000_000) - 1)]


def histogram(values: Sequence[int]) -> list[str]:
    """Bars of the values in ten equal buckets from their minimum to their maximum, a line each."""
    least, width = min(values), -(-(max(values) + 1 - min(values)) // NUM_BUCKETS)
    counts = Counter((value - least) // width for value in values)
    most = max(counts.values())
    lines = []
    for bucket in range(max(counts) + 1):
        start, bar = least + bucket * width, "#" * -(-BAR_WIDTH * counts[bucket] // most)
        lines.append(f"  {start:>6}..{start + width - 1:<6} {counts[bucket]:>7} {bar}".rstrip())
    return lines


def prompt_of(row: Row) -> tuple:
    """All of a row but its last answer."""
    return row.system, row.turns[:-1], row.turns[-1].human


def contradictions(rows: Iterable[Row]) -> tuple[int, list[str]]:
    """How many rows repeat an earlier one exactly, and a problem for each that contradicts an earlier answer."""
    seen: dict[tuple, Row] = {}
    num_repeated, problems = 0, []
    for row in rows:
        first = seen.setdefault(prompt_of(row), row)
        if first is row:
            continue
        if first.turns[-1].assistant == row.turns[-1].assistant:
            num_repeated += 1
        else:
            problems.append(f"line {row.line}: same prompt as line {first.line}, another answer")
    return num_repeated, problems


def leaks(train: Iterable[Row], test: Iterable[Row]) -> list[str]:
    """A problem for each test row whose prompt stands in the training file."""
    lines = {prompt_of(row): row.line for row in train}
    found = ((row.line, lines.get(prompt_of(row))) for row in test)
    return [f"line {line}: its prompt is line {other} of the training file" for line, other in found if other]


def label_balance(rows: Sequence[Row]) -> str:
    """Counts of the last answers, or how many distinct ones there are."""
    counts = Counter(row.turns[-1].assistant for row in rows)
    if len(counts) > MAX_LABELS:
        return f"{len(counts):,} distinct last answers"
    return ", ".join(f"{label} {count:,} ({100 * count / len(rows):.1f} %)" for label, count in counts.most_common())


def describe(
    rows: Sequence[Row], samples: Sequence["Sample"], report: "EncodeReport", max_seq_length: int
) -> list[str]:
    """The lines printed about one file. `samples` are its rows as tokens."""
    turns, lengths = sum(len(row.turns) for row in rows), [len(sample.input_ids) for sample in samples]
    supervised = sum(label >= 0 for sample in samples for label in sample.labels)
    cut, dropped = f"{report.num_cut:,} rows cut", f"{report.num_dropped:,} without a supervised token"
    lines = [
        f"rows                 {len(rows):,}",
        f"turns                {turns:,} ({turns / len(rows):.2f} a row)",
        f"answers              {label_balance(rows)}",
        f"over {max_seq_length:,} tokens".ljust(21) + f"{cut}, {dropped}",
    ]
    if not samples:
        return lines
    points = ", ".join(f"p{round(100 * q)} {percentile(lengths, q)}" for q in (0.5, 0.9, 0.99))
    lines.append(f"tokens               {sum(lengths):,}, of them supervised {supervised:,}")
    lines.append(f"tokens a row, cut    mean {sum(lengths) / len(lengths):.1f}, {points}, max {max(lengths)}")
    return lines + histogram(lengths)


def check_file(path: Path, tokenizer, max_seq_length: int) -> tuple[list[Row], list[str]]:
    """Print the report of one file; its rows and its problems, each with the file's name."""
    from finetune.conversation import encode_rows

    rows = read_rows(path)
    samples, report = encode_rows(tokenizer, rows, max_seq_length)
    num_repeated, problems = contradictions(rows)
    problems += [f"line {line}: no supervised token within {max_seq_length}" for line in report.dropped_lines]
    print(path, *describe(rows, samples, report, max_seq_length), f"repeated rows        {num_repeated:,}", sep="\n")
    return rows, [f"{path}: {problem}" for problem in problems]


def refuse(problems: Sequence[str]) -> None:
    """Raise UserError with the first ten problems, when there are any."""
    if problems:
        rest = len(problems) - MAX_PROBLEMS_SHOWN
        more = f"\n... and {rest} more" if rest > 0 else ""
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(problems[:MAX_PROBLEMS_SHOWN]) + more)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", required=True, help="the checkpoint whose tokenizer counts")
    parser.add_argument("--train_file", type=Path, required=True, help="rows to train on, JSON lines")
    parser.add_argument("--test_file", type=Path, help="held-out rows, JSON lines")
    parser.add_argument("--train_args_file", metavar="JSON", help="the experiment, which says how long a row may be")
    parser.add_argument("--max_seq_length", type=positive, help="tokens a row may have, in place of the experiment's")
    return parser.parse_args()


def length_limit(args: argparse.Namespace) -> int:
    """The flag, else what the experiment says or leaves at its default."""
    if args.max_seq_length is not None:
        return args.max_seq_length
    experiment = ["--train_args_file", args.train_args_file] if args.train_args_file else []
    return parse_experiment(experiment).data.max_seq_length


def main() -> int:
    args = parse_arguments()
    limit = length_limit(args)

    from finetune.models import check_model_dir, load_tokenizer

    tokenizer = load_tokenizer(check_model_dir(args.model_dir))
    train, problems = check_file(args.train_file, tokenizer, limit)
    if args.test_file:
        print()
        test, test_problems = check_file(args.test_file, tokenizer, limit)
        leaked = [f"{args.test_file}: {problem}" for problem in leaks(train, test)]
        print(f"also in training     {len(leaked):,}")
        problems += test_problems + leaked
    refuse(problems)
    return 0


if __name__ == "__main__":
    run_main(main)
