"""Write the bundled data files again: the same bytes every time.

python -m qwen_qlora.data.generate            # text_matching_data_{train,test}.jsonl, keywords_data_{train,test}.jsonl
"""

import argparse
import json
import random
from pathlib import Path

from qwen_qlora.data.keywords import draw_examples
from qwen_qlora.data.text_matching.pairs import WORDINGS, draw_pairs

SEED = 20231203
NUM_MATCHING = {"train": 4000, "test": 500}
NUM_KEYWORDS = {"train": 600, "test": 100}
HERE = Path(__file__).parent


def matching_examples(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, answer) of `count` pairs, the wording drawn anew for each."""
    examples = []
    for pair in draw_pairs(count, rng):
        wording = rng.choice(WORDINGS)
        answer = wording.same if pair.same else wording.different
        examples.append((wording.prompt.format(a=pair.first, b=pair.second), answer))
    return examples


def write_rows(path: Path, dataset: str, category: str, examples: list[tuple[str, str]]) -> None:
    """One row a line, in the walkthrough's format."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, (human, assistant) in enumerate(examples, 1):
            conversation = [{"human": human, "assistant": assistant}]
            row = {"conversation_id": number, "category": category, "conversation": conversation, "dataset": dataset}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def generate(folder: Path) -> None:
    """Write the four files into `folder`. Train and test are one list of distinct examples, cut in two."""
    for dataset, category, draw, counts in (
        ("text_matching_data", "文本匹配", matching_examples, NUM_MATCHING),
        ("keywords_data", "关键词抽取", draw_examples, NUM_KEYWORDS),
    ):
        examples = draw(sum(counts.values()), random.Random(SEED))
        write_rows(folder / f"{dataset}_train.jsonl", dataset, category, examples[: counts["train"]])
        write_rows(folder / f"{dataset}_test.jsonl", dataset, category, examples[counts["train"] :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the files go (default: beside this script)")
    generate(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
