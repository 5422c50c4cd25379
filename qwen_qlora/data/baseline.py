"""The bag-of-characters baseline: what the bundled text-matching task gives away without reading.

    python -m qwen_qlora.data.baseline           # accuracy on the test rows of a classifier fitted on the training rows

A logistic regression on the characters that the two sentences share and on those only one of them has, in any order: all
that word overlap can say. A model that scores above it has understood more than that.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from qwen_qlora.data.text_matching.pairs import WORDINGS, Pair, overlap

HERE = Path(__file__).parent
RIDGE = 1e-3  # of the squared weights; chosen here


def pairs_of(path: str | Path) -> list[Pair]:
    """The sentence pairs of a bundled file, read back out of its prompts. Raises ValueError for any other file."""
    from finetune.rows import read_rows

    patterns = [
        (w, re.compile(re.escape(w.prompt).replace(r"\{a\}", "(.+)").replace(r"\{b\}", "(.+)"))) for w in WORDINGS
    ]
    pairs = []
    for row in read_rows(path):
        (turn,) = row.turns
        found = [(wording, match) for wording, pattern in patterns if (match := pattern.fullmatch(turn.human))]
        if len(found) != 1:
            raise ValueError(f"{path}:{row.line}: not a text-matching prompt of this project")
        wording, match = found[0]
        pairs.append(Pair(match[1], match[2], turn.assistant == wording.same))
    return pairs


def _features(pairs: list[Pair], index: dict[str, int]):
    """(N, 2 V + 2) float32: characters on one side only, characters on both, the overlap, a constant."""
    import torch

    features = torch.zeros(len(pairs), 2 * len(index) + 2)
    for row, pair in enumerate(pairs):
        first, second = Counter(pair.first), Counter(pair.second)
        for character in (first | second).keys() & index.keys():
            features[row, index[character]] = abs(first[character] - second[character])
            features[row, len(index) + index[character]] = min(first[character], second[character])
        features[row, -2] = overlap(pair.first, pair.second)
    features[:, -1] = 1
    return features


def baseline_accuracy(train_file: str | Path, test_file: str | Path) -> float:
    """Share of the test pairs that the fitted baseline labels right."""
    import torch

    train, test = pairs_of(train_file), pairs_of(test_file)
    characters = sorted({character for pair in train for character in pair.first + pair.second})
    index = {character: number for number, character in enumerate(characters)}
    features, labels = _features(train, index), torch.tensor([float(pair.same) for pair in train])
    weights = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, labels)
        loss = loss + RIDGE * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (_features(test, index) @ weights.detach() > 0).tolist()
    return sum(guess == pair.same for guess, pair in zip(predicted, test, strict=True)) / len(test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, default=HERE / "text_matching_data_train.jsonl")
    parser.add_argument("--test_file", type=Path, default=HERE / "text_matching_data_test.jsonl")
    args = parser.parse_args()
    print(
        f"bag-of-characters baseline: {100 * baseline_accuracy(args.train_file, args.test_file):.1f} % of the test pairs"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
