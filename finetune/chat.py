"""Talk to a model in the terminal: a base model, an adapter on it, or a merged model. `make qwen-chat`.

    python -m finetune.chat --model_name_or_path DIR [--adapter_name_or_path DIR] [--load_in_4bit]

Reads questions from the keyboard, or one a line from a pipe, and prints each reply as it is generated. /help lists the
commands. Ctrl-C stops a reply, not the program. Sampling follows the checkpoint unless --temperature is given.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import UserError, run_main

HELP = """\
/reset          forget the conversation
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
    answer: Callable[[list[int]], Iterator[str]]
    room: int  # tokens a prompt may take
    system: str | None = None
    history: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """The system text, if any, and the history."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.history

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
        try:
            for piece in self.answer(prompt_ids):
                pieces.append(piece)
                yield piece
        finally:
            self.history.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> list[int]:
        dropped = fit_history(self.history, self.system, lambda messages: len(self.encode(messages)), self.room)
        head = self.messages()[: -len(self.history)]
        prompt_ids = self.encode(head + self.history[dropped:])
        if len(prompt_ids) > self.room:
            raise UserError(f"the question takes {len(prompt_ids)} tokens, {self.room} fit. Ask a shorter one.")
        if dropped:
            notice(f"the conversation is longer than the model's context: the oldest {dropped // 2} turns were dropped")
            del self.history[:dropped]
        return prompt_ids

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
    if not interactive:
        sys.stdin.reconfigure(errors="replace")  # a stray byte in a file of questions spoils its own line only
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


def run(chat: Chat, interactive: bool) -> None:
    """The conversation, until /exit or the end of input."""
    for line in read_lines(interactive):
        if line.startswith("/"):
            if not chat.command(line):
                return
        elif line:
            try:
                print_reply(chat.ask(line))
            except UserError as error:
                notice(f"error: {error}")


def checkpoint_sampling(model: Any) -> Any:
    """The sampling settings in the checkpoint's generation config, greedy where it asks for none."""
    from finetune.generate import Sampling, causal_model

    config = causal_model(model).generation_config
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(temperature, top_p, config.top_k or 0, penalty)


def load_chat(args: argparse.Namespace) -> Chat:
    """Load the model and make the conversation."""
    from dataclasses import replace

    from finetune.conversation import encode_prompt
    from finetune.generate import causal_model
    from finetune.models import load_for_inference
    from finetune.stream import stream_text

    model, tokenizer = load_for_inference(args.model_name_or_path, args.adapter_name_or_path, args.load_in_4bit)
    sampling = checkpoint_sampling(model)
    if args.temperature is not None:
        sampling = replace(sampling, temperature=args.temperature)
    context = args.context or causal_model(model).config.max_position_embeddings
    room = context - args.max_new_tokens
    if room <= 0:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room in a context of {context} tokens.")
    return Chat(
        encode=lambda messages: encode_prompt(tokenizer, messages),
        answer=lambda ids: stream_text(model, tokenizer, ids, args.max_new_tokens, sampling, args.seed),
        room=room,
    )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder of the base or merged model")
    parser.add_argument("--adapter_name_or_path", help="folder of a LoRA adapter trained on that model")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (default: 16 bit, 32 on a CPU)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest reply, in tokens (default 512)")
    parser.add_argument("--temperature", type=float, help="0: the likeliest token (default: as the checkpoint says)")
    parser.add_argument("--context", type=int, default=0, help="tokens of prompt and reply (default: the model's)")
    parser.add_argument("--seed", type=int, help="the same replies again (default: others every time)")
    return parser.parse_args()


def main() -> None:
    """Load and talk."""
    args = parse_args()
    chat = load_chat(args)
    interactive = sys.stdin.isatty()
    if interactive:
        notice("Ask something. /help lists the commands.")
    run(chat, interactive)


if __name__ == "__main__":
    run_main(main)
