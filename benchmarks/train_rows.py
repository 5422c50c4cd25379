"""Training rows of known lengths, made of the words of a random model's tokenizer (benchmarks.random_model).

A row's length includes what the chat template writes. A fifth of its words is the question, so most tokens are
supervised: a way that computes logits of supervised positions alone gains little by it here.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.random_model import is_qwen, words_of

TEMPLATE_TOKENS = {True: 21, False: 3}  # Qwen's default system message and turns; Baichuan2's two marks and its end
SPREAD = 0.6  # of the lengths' logarithm


@dataclass(frozen=True)
class Workload:
    """Rows with log-normal lengths in tokens, `per_update` of them in an optimiser update."""

    mean: int
    shortest: int
    longest: int
    per_update: int


def draw_lengths(workload: Workload, count: int, seed: int = 0) -> list[int]:
    """Lengths between the shortest and the longest whose mean is about the workload's."""
    draw = random.Random(seed)
    middle = math.log(workload.mean) - SPREAD**2 / 2
    lengths = (draw.lognormvariate(middle, SPREAD) for _ in range(count))
    return [round(min(workload.longest, max(workload.shortest, length))) for length in lengths]


def write_rows(folder: Path, model: str, workload: Workload, count: int) -> Path:
    """A file of `count` rows, the same for the same arguments; one that is there is left as it is."""
    path = folder / f"{model}-{workload.mean}-{workload.shortest}-{workload.longest}-{count}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(1), words_of(model)
    aside = path.with_suffix(".unfinished")
    with open(aside, "w", encoding="utf-8") as file:
        for length in draw_lengths(workload, count):
            # A blank before the first word too: with it a word is one token.
            texts = [f" {word}" for word in draw.choices(words, k=max(2, length - TEMPLATE_TOKENS[is_qwen(model)]))]
            cut = max(1, len(texts) // 5)
            turn = {"human": "".join(texts[:cut]), "assistant": "".join(texts[cut:])}
            file.write(json.dumps({"conversation": [turn]}) + "\n")
    aside.replace(path)
    return path
