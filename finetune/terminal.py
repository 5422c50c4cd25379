"""A conversation in the terminal, whatever computes the answers: the loop of qwen-chat and baichuan-demo.

Reads questions from the keyboard, or one a line from a pipe, and prints each reply as it is generated. /help lists the
commands. Ctrl-C stops a reply, not the program.
"""

import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from finetune.errors import UserError

HELP = """\
/reset          forget the conversation
/save [FILE]    add it to a file of JSON lines, as a training row (FILE without a name: chat-<date>-<time>.jsonl)
/system TEXT    set the system text and forget the conversation; /system alone removes it
/help           this list
/exit           leave (Ctrl-D does too); Ctrl-C stops a reply"""
Message = dict[str, str]


def fit_history(
    history: list[Message], system: str | None, count_tokens: Callable[[list[Message]], int], room: int
) -> int:
    """How many of the oldest messages (whole turns) must go for the rest to take at most `room` tokens.

    The last message, the question itself, always stays: then the count may still be above the room.
    """
    head = [] if system is None else [{"role": "system", "content": system}]
    dropped = 0
    while dropped + 2 < len(history) and count_tokens(head + history[dropped:]) > room:
        dropped += 2
    return dropped


@dataclass
class Chat:
    """A conversation with a loaded model; `answer` streams text for a prompt's token ids."""

    encode: Callable[[list[Message]], list[int]]
    answer: Callable[[list[int]], Generator[str, None, None]]
    room: int  # tokens a prompt may take
    system: str | None = None
    history: list[Message] = field(default_factory=list)

    def _head(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def messages(self) -> list[Message]:
        """The system text, if any, and the history."""
        return self._head() + self.history

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the reply. What was said until the iterator is closed or interrupted enters the history.

        Raises UserError when the question alone is longer than the model's context.
        """
        self.history.append({"role": "user", "content": question})
        try:
            prompt_ids = self._prompt()
        except UserError:
            self.history.pop()
            raise
        pieces: list[str] = []
        whole = False
        try:
            with closing(self.answer(prompt_ids)) as answer:
                for piece in answer:
                    pieces.append(piece)
                    yield piece
            whole = True
        finally:
            if pieces or whole:
                self.history.append({"role": "assistant", "content": "".join(pieces)})
            else:  # nothing was said: as if it had not been asked
                self.history.pop()

    def _prompt(self) -> list[int]:
        dropped = fit_history(self.history, self.system, lambda messages: len(self.encode(messages)), self.room)
        prompt_ids = self.encode(self._head() + self.history[dropped:])
        if len(prompt_ids) > self.room:
            raise UserError(f"the question takes {len(prompt_ids)} tokens, {self.room} fit. Ask a shorter one.")
        if dropped:
            notice(f"the conversation is longer than the model's context: the oldest {dropped // 2} turns were dropped")
            del self.history[:dropped]
        return prompt_ids

    def save(self, name: str) -> str:
        """Add the conversation to a file of training rows (finetune/rows.py); returns what to tell the person."""
        turns = zip(self.history[::2], self.history[1::2], strict=True)
        said = [message for turn in turns if turn[1]["content"].strip() for message in turn]  # a row has no empty reply
        if not said:
            return "there is no conversation to save yet"
        path = Path(name or f"chat-{datetime.now():%Y%m%d-%H%M%S}.jsonl")
        row = json.dumps({"messages": self._head() + said}, ensure_ascii=False)
        try:
            path = path.expanduser()
            with path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except (OSError, RuntimeError, ValueError) as error:  # also a name no file can have: ~nobody, one with a NUL
            return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        return f"saved to {path}"

    def command(self, line: str) -> bool:
        """Carry out a /command; False when it is the one to leave."""
        name, _, text = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name in ("/reset", "/system"):
            self.history.clear()
            if name == "/system":
                self.system = text.strip() or None
                notice(f"system text: {self.system}" if self.system else "no system text")
            else:
                notice("the conversation starts anew")
        elif name == "/save":
            notice(self.save(text.strip()))
        else:
            notice(HELP if name == "/help" else f"unknown command {name}\n{HELP}")
        return True


def notice(text: str) -> None:
    """Words of the program, on stderr: stdout holds the replies alone."""
    print(text, file=sys.stderr, flush=True)


def print_reply(pieces: Iterator[str]) -> None:
    """Print pieces as they come, and a line's end. Ctrl-C ends the reply there."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        notice("\n(stopped)")
    print(flush=True)


def read_lines(interactive: bool) -> Iterator[str]:
    """Questions until the end of input. At the prompt, Ctrl-C clears the line."""
    sys.stdin.reconfigure(errors="replace")  # a stray byte, as of a terminal in GBK, spoils its own line only
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401 gives input() line editing and the arrow keys

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            notice("\n(/exit or Ctrl-D leaves)")
        except EOFError:
            print()
            return


def converse(chat: Chat) -> None:
    """The conversation, until /exit or the end of input."""
    interactive = sys.stdin.isatty()
    if interactive:
        notice("Ask something. /help lists the commands.")
    for line in read_lines(interactive):
        if line.startswith("/"):
            if not chat.command(line):
                return
        elif line:
            try:
                print_reply(chat.ask(line))
            except UserError as error:
                notice(f"error: {error}")
