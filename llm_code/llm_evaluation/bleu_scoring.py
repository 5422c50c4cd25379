"""Scores of Chinese texts against one reference each. Pure functions of (prediction, reference) pairs.

A character is a token, as in the walkthrough's script. An empty prediction scores 0 and stays in every mean.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from finetune.statistics import bootstrap_interval, mean, ratio

Pair = tuple[str, str]
WEIGHTS = (0.25, 0.25, 0.25, 0.25)
# nltk's names; none is the walkthrough's score. Chen & Cherry 2014 describe them.
SMOOTHINGS = ("method1", "method2", "method3", "method4")


def words(text: str) -> list[str]:
    """jieba's words of a text, without white space."""
    import jieba

    jieba.setLogLevel("WARNING")
    return [word for word in jieba.lcut(text) if not word.isspace()]


def sentence_bleu(prediction: str, reference: str, weights: Sequence[float] = WEIGHTS, smoothing: str = "") -> float:
    """nltk's sentence_bleu over characters, unsmoothed unless told; 0 for an empty prediction.

    Without smoothing a prediction that shares no 4-gram with its reference scores about 1e-78 and not 0.
    """
    from nltk.translate import bleu_score

    function = getattr(bleu_score.SmoothingFunction(), smoothing) if smoothing else None
    with warnings.catch_warnings():  # one for every row without a common n-gram
        warnings.simplefilter("ignore", UserWarning)
        return float(
            bleu_score.sentence_bleu([list(reference)], list(prediction), weights, smoothing_function=function)
        )


def sacre_bleu(pairs: Sequence[Pair], tokenizer: str, **options: str) -> dict[str, Any]:
    """sacrebleu's score of all rows together, between 0 and 1, and the signature that lets others repeat it.

    `zh` splits off Chinese characters and keeps other words whole, `char` splits every character.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenizer, **options)
    score = metric.corpus_score([prediction for prediction, _ in pairs], [[reference for _, reference in pairs]])
    return {"score": score.score / 100, "signature": str(metric.get_signature())}


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """Counts of the n-grams of a list of tokens."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def rouge_n(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F1 of the n-grams two lists of tokens share, each counted as often as both have it (Lin 2004)."""
    ours, theirs = ngrams(prediction, n), ngrams(reference, n)
    return ratio(2 * (ours & theirs).total(), ours.total() + theirs.total())


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length. Rows of the usual table as bits of one number (Hyyrö 2004), so 1,000 tokens take a millisecond."""
    places: dict[str, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row = everything
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of tokens."""
    return ratio(2 * longest_common_subsequence(prediction, reference), len(prediction) + len(reference))


ROUGES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "rouge_1": partial(rouge_n, n=1),
    "rouge_2": partial(rouge_n, n=2),
    "rouge_l": rouge_l,
}


def rouge(pairs: Sequence[Pair], tokens: Callable[[str], list[str]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L over all rows."""
    split = [(tokens(prediction), tokens(reference)) for prediction, reference in pairs]
    return {name: mean([function(*pair) for pair in split]) for name, function in ROUGES.items()}


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all character n-grams of all texts together."""
    counts = sum((ngrams(text, n) for text in texts), Counter())
    return ratio(len(counts), counts.total())


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's character n-grams that stand in it before; near 1 for a text that goes round in circles."""
    counts = ngrams(text, n)
    return ratio(counts.total() - len(counts), counts.total())


def score_pairs(pairs: Sequence[Pair]) -> tuple[list[float], dict[str, Any]]:
    """The walkthrough's score of each row, and everything that is said about all of them."""
    scores = [sentence_bleu(*pair) for pair in pairs]
    predictions = [prediction for prediction, _ in pairs]
    lengths = [len(text) for text in predictions]
    summary = {
        "rows": len(pairs),
        "bleu": mean(scores),
        "bleu_bootstrap_95": bootstrap_interval(scores),
        "bleu_with_n_plus_1": sum(scores)
        / (len(scores) + 1),  # how the course's scripts average: the count starts at 1
        "bleu_by_order": {str(n): mean([sentence_bleu(*pair, (1 / n,) * n) for pair in pairs]) for n in (1, 2, 3, 4)},
        "bleu_smoothed": {name: mean([sentence_bleu(*pair, smoothing=name) for pair in pairs]) for name in SMOOTHINGS},
        # not nltk's corpus_bleu, which counts a phantom n-gram for every row that has none
        "corpus_bleu": sacre_bleu(pairs, "char", smooth_method="none"),
        "sacrebleu_zh": sacre_bleu(pairs, "zh"),
        "rouge_characters": rouge(pairs, list),
        "rouge_words": rouge(pairs, words),
        "distinct": {str(n): distinct(predictions, n) for n in (1, 2)},
        "repetition": mean([repetition(text) for text in predictions]),
        "length_ratio": ratio(sum(lengths), sum(len(reference) for _, reference in pairs)),
        "empty": ratio(sum(not text.strip() for text in predictions), len(predictions)),
    }
    return scores, summary
