"""An answer's tokens turned into text that is certain: no half characters, nothing that may become a stop string."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.stream import TextAssembler
from llm_code.module_interface.interface import Token


def first_match(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(position, stop string) of the one that begins first; of several there, the longest."""
    found = [(position, -len(stop), stop) for stop in stops if (position := text.find(stop)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def held_length(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops if len(s) > n)), 0)


class TextStream:
    """Takes tokens, gives out those whose text is certain, Token by Token: texts and log-probabilities agree."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], min_tokens: int = 0) -> None:
        self.assembler = TextAssembler(tokenizer)
        self.stops, self.min_tokens = tuple(stops), min_tokens
        self.num_tokens = 0
        self.stopped_by: str | None = None
        self._held: list[Token] = []

    def add(self, token: Token) -> list[Token]:
        """The tokens that became certain with this one. Afterwards `stopped_by` is the stop string that ended it."""
        self.num_tokens += 1
        piece = self.assembler.add(token.id)
        self._held.append(replace(token, text=piece))
        return self._release() if piece else []

    def finish(self) -> list[Token]:
        """What was still held back, without an unfinished character."""
        if self._held and (rest := self.assembler.rest()):
            self._held[-1] = replace(self._held[-1], text=self._held[-1].text + rest)
            if self.stops and self.num_tokens >= self.min_tokens and self._stop_at(self._text()):
                return self._cut()
        released, self._held = self._held, []
        return released

    def _text(self) -> str:
        return "".join(token.text for token in self._held)

    def _release(self) -> list[Token]:
        if not self.stops:
            released, self._held = self._held, []
            return released
        text = self._text()
        if self.num_tokens >= self.min_tokens and self._stop_at(text):
            return self._cut()
        certain = len(text) - held_length(text, self.stops)
        released: list[Token] = []
        while self._held and len(self._held[0].text) <= certain:
            certain -= len(self._held[0].text)
            released.append(self._held.pop(0))
        return released

    def _stop_at(self, text: str) -> bool:
        match = first_match(text, self.stops)
        if match:
            self._end, self.stopped_by = match
        return match is not None

    def _cut(self) -> list[Token]:
        """The held tokens up to the stop string; the one in which it begins keeps the text before it."""
        released, room = [], self._end
        for token in self._held:
            if room <= 0:
                break
            released.append(replace(token, text=token.text[:room]))
            room -= len(token.text)
        self._held = []
        return released
