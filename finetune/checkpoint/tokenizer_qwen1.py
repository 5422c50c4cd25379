"""qwen.tiktoken -> a Hugging Face fast tokenizer with the same ids, and the ids to compare with.

A tiktoken file lists byte strings by rank; BPE merges are recovered by replaying BPE on each entry with the ranks below
its own: the two parts left over are its merge. Special tokens follow the last rank in a fixed order.
"""

import base64
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.checkpoint.chat_templates import QWEN_TEMPLATE
from finetune.errors import UserError

# Both from tokenization_qwen.py of Qwen/Qwen-7B.
PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte string -> rank. Raises UserError on a missing or damaged file."""
    if not path.exists():
        raise UserError(f"{path} is missing: it is the vocabulary. Run the download step again.")
    try:
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except ValueError as error:
        raise UserError(f"{path}: expected lines of 'base64 rank': {error}. Download the file again.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(f"{path}: expected ranks 0..n-1 with the 256 bytes among them. Download the file again.")
    return ranks


def special_ids(ranks: dict[bytes, int]) -> dict[str, int]:
    """Special token -> id."""
    return {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}


def token_ids(source: Path) -> dict[str, int]:
    """Special token -> id, read from the source folder."""
    return special_ids(read_ranks(source / "qwen.tiktoken"))


def merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts BPE joins last to make this token, or None if it is never reached."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(joined)
        if best >= rank:
            return None
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """Byte -> the printable character byte-level BPE writes for it (the table of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Both in the letters of byte-level BPE, merges in rank order."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks.items(), key=lambda item: item[1])
    merges = [merge_of(token, rank, ranks) for token, rank in ordered if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in ordered}
    return vocabulary, [(spell(left), spell(right)) for left, right in filter(None, merges)]


def build_tokenizer(ranks: dict[bytes, int]) -> Any:
    """A tokenizers.Tokenizer with NFC, the pattern, byte-level BPE and the specials behind the ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = vocabulary_and_merges(ranks)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # One by one: ids are given in the order of the call.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from finetune.checkpoint.tokenizer_files import write_tokenizer_files

    ranks = read_ranks(source / "qwen.tiktoken")
    if len(ranks) + len(SPECIAL_TOKENS) > config["vocab_size"]:
        raise UserError(
            f"qwen.tiktoken needs {len(ranks) + len(SPECIAL_TOKENS)} embedding rows, config.json has vocab_size "
            f"{config['vocab_size']}: the two belong to different models."
        )
    settings = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "model_max_length": config["seq_length"],
        "pad_token": "<|endoftext|>",
    }
    write_tokenizer_files(target, build_tokenizer(ranks), settings, QWEN_TEMPLATE)


def reference_ids(source: Path, texts: Iterable[str]) -> list[list[int]]:
    """What the published tokenizer gives: tiktoken on NFC text, control tokens in the text read as such."""
    import tiktoken

    ranks = read_ranks(source / "qwen.tiktoken")
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_ids(ranks))
    return [encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all") for text in texts]
