"""Train the tiny models' byte-level BPE vocabulary and write it in tiktoken's format, one `base64(token) rank` a line.

python -m tests.tiny.vocabulary tests/tiny/qwen.tiktoken
"""

import argparse
import base64
import itertools
from pathlib import Path

from tests.tiny.corpus import bundled_prompts, documents

VOCABULARY = Path(__file__).with_name("qwen.tiktoken")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
NUM_RANKS = 2048
NUM_DOCUMENTS = 20000
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
)


def train(texts: list[str]) -> list[bytes]:
    """The tokens in rank order: 256 bytes, then the merges."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS, initial_alphabet=alphabet, max_token_length=9, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(to_byte[character] for character in token) for token, _ in vocabulary]


def encoding():
    """The tiktoken encoding of the tiny vocabulary with Qwen's special tokens behind the ranks."""
    import tiktoken

    lines = VOCABULARY.read_text(encoding="ascii").splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("tiny-qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    texts = ["".join(pair) for pair in itertools.islice(documents(seed=1), NUM_DOCUMENTS)] + sorted(bundled_prompts())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(train(texts))]
    path.write_text("".join(lines), encoding="ascii")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
