"""The bundled rows: as promised in size, reproducible, without overlap, and not solved by word overlap."""

import json
import random
import re
from pathlib import Path

import pytest

from finetune.rows import read_rows
from qwen_qlora.data import generate, keywords
from qwen_qlora.data.baseline import baseline_accuracy, pairs_of
from qwen_qlora.data.text_matching import words
from qwen_qlora.data.text_matching.frames import FRAMES, draw_meaning, near_miss
from qwen_qlora.data.text_matching.pairs import WORDINGS

DATA = Path(generate.__file__).parent
FILES = {
    "text_matching_data_train": 4000,
    "text_matching_data_test": 500,
    "keywords_data_train": 600,
    "keywords_data_test": 100,
}


def test_the_generator_gives_the_committed_bytes(tmp_path):
    generate.generate(tmp_path)
    for name, count in FILES.items():
        committed = (DATA / f"{name}.jsonl").read_bytes()
        assert (tmp_path / f"{name}.jsonl").read_bytes() == committed
        assert len(read_rows(DATA / f"{name}.jsonl")) == count
        assert set(json.loads(committed.split(b"\n")[0])) == {"conversation_id", "category", "conversation", "dataset"}


@pytest.mark.parametrize("dataset", ["text_matching_data", "keywords_data"])
def test_no_test_prompt_stands_in_training(dataset):
    train, test = (
        {row.turns[0].human for row in read_rows(DATA / f"{dataset}_{part}.jsonl")} for part in ("train", "test")
    )
    assert not train & test


def test_no_sentence_pair_of_the_test_stands_in_training_in_any_order():
    train, test = (
        {frozenset((p.first, p.second)) for p in pairs_of(DATA / f"text_matching_data_{part}.jsonl")}
        for part in ("train", "test")
    )
    assert len(test) == 500 and not train & test


def test_labels_and_wordings_are_balanced():
    pairs = pairs_of(DATA / "text_matching_data_train.jsonl")
    assert 0.45 < sum(pair.same for pair in pairs) / len(pairs) < 0.55
    answers = {row.turns[0].assistant for row in read_rows(DATA / "text_matching_data_train.jsonl")}
    assert answers == {answer for wording in WORDINGS for answer in (wording.same, wording.different)}


def test_the_same_words_in_another_order_may_mean_something_else():
    """Pairs made of the same characters have both labels, which no bag of characters can tell apart."""
    pairs = pairs_of(DATA / "text_matching_data_train.jsonl")
    labels = {pair.same for pair in pairs if sorted(pair.first) == sorted(pair.second)}
    assert labels == {True, False}


def test_the_baseline_of_characters_is_far_below_the_goal():
    accuracy = baseline_accuracy(DATA / "text_matching_data_train.jsonl", DATA / "text_matching_data_test.jsonl")
    assert 0.5 < accuracy < 0.75


def test_concepts_of_one_list_share_no_word():
    """Two concepts with a common word would make a pair both same and different."""
    lists = [value for name, value in vars(words).items() if name.isupper() and name != "DIMENSIONS"]
    for concepts in [*lists, [side for sides in words.DIMENSIONS for side in sides]]:
        all_words = [word for concept in concepts for word in concept]
        assert len(all_words) == len(set(all_words)) and all(all_words)


def test_templates_of_two_intents_are_never_the_same_sentence():
    for frame in FRAMES.values():
        templates = [template for intent in frame.intents.values() for template in intent]
        assert len(templates) == len(set(templates))
        for template in templates:
            assert set(re.findall(r"\{(\w+)", template)) == set(frame.slots)


def test_a_near_miss_differs_in_exactly_one_thing():
    rng = random.Random(0)
    for _ in range(2000):
        meaning = draw_meaning(rng)
        other = near_miss(meaning, rng)
        changed = [slot for slot, value in meaning.choice if dict(other.choice)[slot] != value]
        assert other.frame == meaning.frame and other != meaning
        if other.intent != meaning.intent:
            assert not changed
        else:
            swapped = sorted(dict(meaning.choice).values()) == sorted(dict(other.choice).values())
            assert len(changed) == 1 or (len(changed) == 2 and swapped)


def test_keywords_stand_in_their_passage_in_order():
    for prompt, answer in keywords.draw_examples(200, random.Random(0)):
        places = [prompt.index(term) for term in answer.split("、")]
        assert places == sorted(places) and 3 <= len(places) <= 5
