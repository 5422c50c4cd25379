"""A conversation with the service, line by line, from a keyboard or a pipe."""

import asyncio
import sys
import threading
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.terminal import notice

if TYPE_CHECKING:
    from llm_code.service.client_api import Client

Messages = list[dict[str, str]]
TOO_LONG = "context_length_exceeded"  # the protocol's code
HELP = """\
/reset    forget the conversation
/help     this list
/exit     leave (Ctrl-C and Ctrl-D do too)"""


async def print_answer(client: "Client", messages: Messages) -> str:
    """Stream an answer to stdout; returns it."""
    pieces = []
    async with aclosing(client.stream(messages)) as stream:
        async for piece in stream:
            pieces.append(piece)
            print(piece, end="", flush=True)
    print()
    return "".join(pieces)


async def converse(client: "Client", head: Messages) -> None:
    """Read a question a line from stdin and answer it in the light of those before; a failed turn is forgotten.

    `head`: the system message, if any, which stays whatever is forgotten.
    """
    turns: Messages = []
    shown = sys.stdin.isatty()
    if shown:
        notice("Ask something. /help lists the commands.")
    while line := await _next_line("> " if shown else ""):
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text.startswith("/"):
            if text == "/reset":
                turns = []
            said = {"/reset": "the conversation starts anew", "/help": HELP}
            notice(said.get(text, f"unknown command {text}\n{HELP}"))
        elif text:
            try:
                turns = await _answered(client, head, [*turns, {"role": "user", "content": text}])
            except UserError as error:
                if not shown:
                    raise
                notice(f"error: {error}")


async def _answered(client: "Client", head: Messages, turns: Messages) -> Messages:
    """The turns with an answer to the last, without the oldest ones where the service has no room for all."""
    from llm_code.service.client_api import Refused

    dropped = 0
    while True:
        try:
            answer = await print_answer(client, head + turns)
        except Refused as error:
            if error.code != TOO_LONG or len(turns) == 1:
                raise
            turns, dropped = turns[2:], dropped + 1
            continue
        if dropped:
            notice(f"(the conversation is longer than the model's context: the oldest {dropped} turns were dropped)")
        return [*turns, {"role": "assistant", "content": answer}]


async def _next_line(prompt: str) -> str:
    """The next line of stdin, empty at the end. What is no text in the terminal's encoding becomes U+FFFD."""
    if prompt:
        print(prompt, end="", file=sys.stderr, flush=True)
    loop = asyncio.get_running_loop()
    read: asyncio.Future[bytes] = loop.create_future()

    def hand_over(line: bytes) -> None:
        if not read.done():  # cancelled by Ctrl-C
            read.set_result(line)

    def wait_for_line() -> None:
        line = b""
        # Unbuffered: a thread inside sys.stdin holds its lock, and the interpreter breaks down over that when it ends.
        with suppress(OSError), open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
            line = stdin.readline()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(hand_over, line)

    # Not asyncio.to_thread: the program's end waits for its threads, so Ctrl-C would wait for Enter.
    threading.Thread(target=wait_for_line, daemon=True).start()
    return (await read).decode(sys.stdin.encoding, "replace")
