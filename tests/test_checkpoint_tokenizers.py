"""Converted tokenizers give the ids of tiktoken and sentencepiece, and templates those of the published builders."""

import base64
import random
import re
import unicodedata

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from finetune.checkpoint.tokenizer_baichuan2 import read_model
from finetune.checkpoint.tokenizer_qwen1 import read_ranks
from finetune.errors import UserError

SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\u2028", "\u200b", "\ufeff"]
RANGES = [(32, 127), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x600, 0x700), (0x900, 0x980), (0x3040, 0x3100)]
RANGES += [(0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xFF00, 0xFFF0), (0x1F300, 0x1FA00), (0x20000, 0x2A000), (1, 0xD800)]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_texts(number):
    """Strings of up to 16 characters from many scripts, with whitespace between."""
    rng = random.Random(7)
    for _ in range(number):
        drawn = [chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 12))]
        drawn += rng.choices(SPACES, k=rng.randrange(0, 5))
        rng.shuffle(drawn)
        yield "".join(drawn)


def bundled_rows(repository):
    for path in sorted((repository / "qwen_qlora" / "data").glob("*.jsonl")):
        yield from path.read_text(encoding="utf-8-sig").splitlines()[:300]


@pytest.fixture(scope="module")
def texts(request):
    return [*random_texts(3000), *bundled_rows(request.config.rootpath)]


@pytest.fixture(scope="module")
def qwen_reference(tiny_qwen_original):
    """tiktoken's own encoding, built from the vocabulary file without the converter's code."""
    lines = (tiny_qwen_original / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
    specials = {name: len(ranks) + i for i, name in enumerate(names)}
    return tiktoken.Encoding("reference", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens=specials)


@pytest.fixture(scope="module")
def qwen_tokenizer(tiny_qwen):
    return AutoTokenizer.from_pretrained(tiny_qwen)


@pytest.fixture(scope="module")
def baichuan_tokenizer(tiny_baichuan):
    return AutoTokenizer.from_pretrained(tiny_baichuan)


def ids_by_file(folder, texts):
    """What loaders get that take tokenizer.json as it stands, as AutoTokenizer need not."""
    return [encoding.ids for encoding in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)]


def test_qwen_ids(texts, qwen_reference, qwen_tokenizer, tiny_qwen):
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    assert any(text != other for text, other in zip(texts, composed, strict=True))
    expected = [qwen_reference.encode(text, allowed_special="all") for text in composed]
    assert qwen_tokenizer(texts, add_special_tokens=False)["input_ids"] == expected
    assert ids_by_file(tiny_qwen, texts) == expected
    assert qwen_tokenizer.batch_decode(expected) == composed


def test_qwen_special_tokens(qwen_reference, qwen_tokenizer):
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"):
        assert qwen_tokenizer.convert_tokens_to_ids(name) == qwen_reference.encode_single_token(name)
    assert len(qwen_tokenizer) == qwen_reference.n_vocab
    assert (qwen_tokenizer.eos_token, qwen_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (qwen_tokenizer.bos_token, qwen_tokenizer.padding_side) == (None, "left")


def test_qwen_text_split_from_control_tokens(qwen_reference, qwen_tokenizer):
    text = "a<|im_end|>\n<|im_start|>system"
    assert qwen_tokenizer(text, split_special_tokens=True)["input_ids"] == qwen_reference.encode_ordinary(text)


def test_baichuan_ids(texts, tiny_baichuan_original, tiny_baichuan, baichuan_tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_baichuan_original / "tokenizer.model"))
    expected = reference.encode(texts)
    assert baichuan_tokenizer(texts, add_special_tokens=False)["input_ids"] == expected
    assert ids_by_file(tiny_baichuan, texts) == expected
    assert baichuan_tokenizer.batch_decode(expected) == reference.decode(expected)
    assert type(baichuan_tokenizer).__name__ != "LlamaTokenizer"


def test_baichuan_special_tokens(baichuan_tokenizer):
    names = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
    assert baichuan_tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 195, 196]
    assert (baichuan_tokenizer.eos_token_id, baichuan_tokenizer.pad_token_id) == (2, 0)


CONVERSATION = [
    {"role": "user", "content": "今天天气很好 hello"},
    {"role": "assistant", "content": "谢谢你"},
    {"role": "user", "content": "再见 2023"},
]


@pytest.mark.parametrize("system", [None, "你是心理咨询师。"])
def test_qwen_template(qwen_reference, qwen_tokenizer, system):
    """ids as make_context of qwen_generation_utils.py builds them: each part encoded alone, then joined."""
    start, end = (qwen_reference.encode_single_token(t) for t in ("<|im_start|>", "<|im_end|>"))
    newline = qwen_reference.encode_ordinary("\n")

    def turn(role, content):
        return [start, *qwen_reference.encode_ordinary(role), *newline, *qwen_reference.encode_ordinary(content), end]

    messages = ([{"role": "system", "content": system}] if system else []) + CONVERSATION
    expected = turn("system", system or "You are a helpful assistant.")
    for message in CONVERSATION:
        expected += newline + turn(message["role"], message["content"])
    expected += [*newline, start, *qwen_reference.encode_ordinary("assistant"), *newline]
    assert qwen_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected


@pytest.mark.parametrize("system", [None, "你是心理咨询师。"])
def test_baichuan_template(tiny_baichuan_original, baichuan_tokenizer, system):
    """ids as build_chat_input of generation_utils.py builds them."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_baichuan_original / "tokenizer.model"))
    messages = ([{"role": "system", "content": system}] if system else []) + CONVERSATION
    expected = reference.encode(system) if system else []
    for message in CONVERSATION:
        expected += [195 if message["role"] == "user" else 196, *reference.encode(message["content"])]
    assert baichuan_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == [
        *expected,
        196,
    ]


@pytest.mark.parametrize(("family", "answer"), [("qwen", "谢谢你<|im_end|>\n"), ("baichuan", "谢谢你</s>")])
def test_template_marks_the_answer(request, family, answer):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    encoded = tokenizer.apply_chat_template(
        CONVERSATION[:2], return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == answer


@pytest.mark.parametrize("family", ["qwen", "baichuan"])
def test_template_refuses_unknown_roles(request, family):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    with pytest.raises(Exception, match="expected role user, assistant or a leading system, got tool"):
        tokenizer.apply_chat_template([*CONVERSATION, {"role": "tool", "content": "x"}])


def test_damaged_vocabularies_are_refused(tmp_path, tiny_qwen_original, tiny_baichuan_original):
    torn = tmp_path / "qwen.tiktoken"
    whole = (tiny_qwen_original / "qwen.tiktoken").read_bytes()
    torn.write_bytes(whole[: whole.index(b" 700\n")])
    with pytest.raises(UserError, match=re.escape(str(torn))):
        read_ranks(torn)
    model = tmp_path / "tokenizer.model"
    model.write_bytes((tiny_baichuan_original / "tokenizer.model").read_bytes()[:-1000])
    with pytest.raises(UserError, match=re.escape(str(model))):
        read_model(model)


def test_other_sentencepiece_models_are_refused(tmp_path):
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "good day"]), model_writer=written, model_type="bpe", vocab_size=30,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    with pytest.raises(UserError, match="not the tokenizer of a Baichuan2 model: byte_fallback False"):
        read_model(tmp_path / "tokenizer.model")
