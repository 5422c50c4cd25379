"""Single tokens as text and bytes, for log-probabilities."""

from functools import cached_property, lru_cache
from typing import Any

from finetune.stream import UNFINISHED, TextAssembler


class TokenTexts:
    """What each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = lru_cache(maxsize=1 << 16)(self._text)

    def _text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def bytes(self, token_id: int) -> bytes:
        """The token's bytes, also where they are part of a character."""
        text = self.text(token_id)
        if UNFINISHED not in text:
            return text.encode()
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        if name.startswith("<0x") and name.endswith(">"):  # sentencepiece's byte tokens
            return bytes([int(name[3:-1], 16)])
        if all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        return text.encode()

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte that each character of a byte-level vocabulary stands for."""
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in kept]
        return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(others)}

    def pieces(self, token_ids: list[int]) -> list[str]:
        """The text each token completes; joined they are the decoded whole, control tokens by name."""
        assembler = TextAssembler(self.tokenizer, skip_special_tokens=False)
        pieces = [assembler.add(token_id) for token_id in token_ids]
        if pieces:
            pieces[-1] += assembler.rest()
        return pieces
