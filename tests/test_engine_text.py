"""Text of an answer as it streams: stop strings cut exactly and never shown in part, characters never halved."""

import random

import pytest

from finetune.stream import UNFINISHED
from llm_code.module_interface.interface import Token
from llm_code.module_interface.stop_strings import TextStream, first_match, held_length
from llm_code.module_interface.tokens import TokenTexts
from tests.engines import Bytes


class Words:
    """A tokenizer whose tokens are the given pieces of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.pieces[i] for i in ids)


def run(pieces, stops, min_tokens=0):
    """(texts given out one by one, all of them joined, the stop string) for tokens with these texts."""
    stream, given = TextStream(Words(*pieces), stops, min_tokens), []
    for i in range(len(pieces)):
        given.append(stream.add(Token(i, "")))
        if stream.stopped_by is not None:
            break
    else:
        given.append(stream.finish())
    texts = ["".join(token.text for token in tokens) for tokens in given]
    return texts, "".join(texts), stream.stopped_by


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stopped_by"),
    [
        (["Hello", " wor", "ld", "!"], ["world"], "Hello ", "world"),  # over two tokens
        (["a", "b", "c", "d", "e"], ["bcd"], "a", "bcd"),  # over three
        (["a", "b", "c"], ["abc"], "", "abc"),  # equal to the whole answer
        (["xx", "yy"], ["yy"], "xx", "yy"),  # at the very end
        (["a\n", "\n", "b"], ["\n\n"], "a", "\n\n"),
        (["ab", "ab", "ac"], ["abac"], "ab", "abac"),  # its beginning comes once too often
        (["aaa", "ab"], ["aab"], "aa", "aab"),
        (["one", "STOPtwo", "STOP"], ["STOP"], "one", "STOP"),  # inside one token
        (["x", "ab", "c"], ["bc", "abc"], "x", "abc"),  # the one that begins first
        (["x", "ab", "cd"], ["ab", "abcd"], "x", "ab"),  # the one that is complete first
        (["xabcd"], ["ab", "abcd"], "x", "abcd"),  # of two complete ones at one place the longer
        (["ab", "cab"], ["abd"], "abcab", None),  # a beginning that comes to nothing is given out at the end
        (["你", "好", "吗"], ["好吗"], "你", "好吗"),
    ],
)
def test_stop_strings(pieces, stops, text, stopped_by):
    texts, joined, found = run(pieces, stops)
    assert (joined, found) == (text, stopped_by)
    assert not any(joined.endswith(stop[:n]) for stop in stops for n in range(len(stop), len(stop))), texts


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_told():
    assert run(["a", "b", "x", "c"], ["bc"])[0] == ["a", "", "bx", "c", ""]
    assert run(["x ", "wor", "k"], ["world"])[0] == ["x ", "", "work", ""]


def test_no_stop_string_ends_an_answer_before_min_tokens():
    assert run(["a", "S", "b", "S", "c"], ["S"], min_tokens=3)[1:] == ("aSb", "S")
    assert run(["a", "S", "b"], ["S"], min_tokens=4)[1:] == ("aSb", None)
    assert run(["a", "S", "b"], ["S"], min_tokens=2)[1:] == ("a", "S")  # the second token may


def test_streams_of_random_tokens_are_the_text_before_the_first_stop_string():
    """Against cutting the whole text; and whatever is shown is never more than that, at any moment."""
    rng = random.Random(0)
    for _ in range(500):
        pieces = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(1, 12))]
        stops = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 3))]
        texts, joined, found = run(pieces, stops)
        whole = "".join(pieces)
        # the answer ends with the token that completes a stop string; among those complete then, the first counts
        ends = [len("".join(pieces[: n + 1])) for n in range(len(pieces))]
        end = next((end for end in ends if any(stop in whole[:end] for stop in stops)), None)
        if end is None:
            assert (joined, found) == (whole, None)
        else:
            assert joined == whole[: min(p for stop in stops if (p := whole[:end].find(stop)) >= 0)]
            assert found in stops


def test_held_length_and_first_match():
    assert held_length("hello wor", ["world", "orb"]) == 3
    assert held_length("hello", ["world"]) == 0
    assert held_length("", ["world"]) == 0
    assert first_match("aXbY", ["Y", "Xb"]) == (1, "Xb")
    assert first_match("abc", ["Y"]) is None


def test_a_character_is_given_out_whole():
    text = "a你😀b"
    stream, texts = TextStream(Bytes(), []), []
    for byte in text.encode():
        texts.append("".join(token.text for token in stream.add(Token(byte, ""))))
    assert texts == ["a", "", "", "你", "", "", "", "😀", "b"]
    assert stream.finish() == []


def test_an_unfinished_character_at_the_end_is_dropped():
    stream = TextStream(Bytes(), [])
    given = [token for byte in "a你".encode()[:-1] for token in stream.add(Token(byte, ""))] + stream.finish()
    assert "".join(token.text for token in given) == "a"
    assert [token.id for token in given] == list("a你".encode()[:-1])  # their log-probabilities are not lost


def test_a_stop_string_inside_characters_in_pieces():
    stream = TextStream(Bytes(), ["好"])
    given = []
    for byte in "你好吗".encode():
        given += stream.add(Token(byte, ""))
        if stream.stopped_by:
            break
    assert ("".join(token.text for token in given), stream.stopped_by) == ("你", "好")


def test_texts_and_bytes_of_single_tokens(tiny_qwen):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    texts = TokenTexts(tokenizer)
    text = "你好，<world> 𠮷😀\n"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(texts.bytes(i) for i in ids) == text.encode()
    assert "".join(texts.pieces(ids)) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (texts.text(end), texts.bytes(end)) == ("<|im_end|>", b"<|im_end|>")
    assert "".join(texts.pieces([*ids, end])) == text + "<|im_end|>"
    half = ids[-3]
    assert UNFINISHED in texts.text(half)
    assert "".join(texts.pieces([half] * 400 + ids)) == UNFINISHED * 400 + text
    assert all(len(texts.bytes(i)) == 1 for i in range(256))  # the first tokens of its vocabulary are single bytes
