"""Ask the service: one question, a file of questions, or a conversation.

python -m llm_code.service.client --question 最近总是睡不着怎么办
python -m llm_code.service.client --file questions.txt --output answers.jsonl     # one a line, or JSON lines
python -m llm_code.service.client                                                 # a conversation, line by line

A file's lines are questions, or objects with `query` or `messages`. The answers are written as JSON lines in the same
order, with `error` in place of `answer` where there was none (the exit status is then 1). API_KEY is the key.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from finetune.errors import UserError, run_main
from finetune.flag_types import amount, positive
from finetune.lines import numbered_lines
from llm_code.module_interface.addresses import server_url
from llm_code.service.client_conversation import Messages, converse, print_answer
from llm_code.service.settings import own_key

if TYPE_CHECKING:
    from llm_code.service.client_api import Client


def utf8(text: str) -> str:
    """A word of the command line; refused when its bytes are no UTF-8, as from a terminal set to GBK."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="surrogateescape").decode(errors="replace")
        said = f"expected text in UTF-8, got {shown!r}. Set the terminal to UTF-8."
        raise argparse.ArgumentTypeError(said) from None
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", type=server_url, default="http://127.0.0.1:10820", help="the service (default: %(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--question", type=utf8, help="ask this and print the answer")
    what.add_argument("--file", type=Path, help="ask every line of this file")
    parser.add_argument("--output", type=Path, help="where the answers to --file go (default: stdout)")
    parser.add_argument("--concurrency", type=positive, default=8, help="questions of --file under way at a time (8)")
    parser.add_argument("--system", type=utf8, help="what the model is told before everything else")
    parser.add_argument("--max_tokens", type=positive, help="limit of an answer (default: the service's)")
    parser.add_argument("--temperature", type=amount, help="0 always takes the likeliest token")
    parser.add_argument("--patience", type=amount, default=120.0, help="seconds to retry a busy service (120)")
    return parser.parse_args()


def read_questions(path: Path, system: str | None) -> list[Messages]:
    """Conversations to answer, one for every line that is not empty. Raises UserError."""
    conversations = []
    for number, line in numbered_lines(path, "a file of questions", json_lines=False):
        messages = [{"role": "user", "content": line.strip()}]
        if line.lstrip().startswith("{"):
            messages = _messages_of(line, f"{path}:{number}")
        conversations.append(_head(system) + messages)
    if not conversations:
        raise UserError(f"{path}: expected one question a line, found none.")
    return conversations


def _messages_of(line: str, place: str) -> Messages:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: expected a JSON object: {error}") from None
    messages = row.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": row.get("query")}]
    if not isinstance(messages, list) or not messages or not all(map(_has_text, messages)):
        raise UserError(f"{place}: expected a text in `query`, or `messages`: a list of objects with a text `content`.")
    return messages


def _has_text(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), str)


def _head(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system else []


async def answer_all(client: "Client", conversations: Sequence[Messages], concurrency: int, output: TextIO) -> int:
    """Write every answer in the order of the questions, as soon as those before are there; returns how many failed."""
    from tqdm import tqdm

    places = asyncio.Semaphore(max(1, concurrency))
    bar = tqdm(total=len(conversations), unit="question", file=sys.stderr, disable=None)

    async def one(messages: Messages) -> dict[str, Any]:
        async with places:
            row: dict[str, Any] = {"query": messages[-1]["content"]}
            try:
                row["answer"] = await client.answer(messages)
            except UserError as error:
                row["error"] = str(error)
            bar.update()
            return row

    failed = 0
    tasks = [asyncio.ensure_future(one(messages)) for messages in conversations]
    for task in tasks:
        row = await task
        failed += "error" in row
        print(json.dumps(row, ensure_ascii=False), file=output, flush=True)
    bar.close()
    return failed


async def run(args: argparse.Namespace) -> int:
    from llm_code.service.client_api import Client

    given = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    options = {name: value for name, value in given.items() if value is not None}
    conversations = read_questions(args.file, args.system) if args.file else []
    async with Client(args.url.rstrip("/").removesuffix("/v1"), own_key(), options, args.patience) as client:
        if args.question is not None:
            await print_answer(client, [*_head(args.system), {"role": "user", "content": args.question}])
        elif not args.file:
            await converse(client, _head(args.system))
        elif args.output:
            with _opened(args.output) as output:
                return 1 if await answer_all(client, conversations, args.concurrency, output) else 0
        else:
            return 1 if await answer_all(client, conversations, args.concurrency, sys.stdout) else 0
    return 0


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output {path}: expected a file that can be written, but {error.strerror}. "
            "Make its folder first, or name another file."
        ) from None


def main() -> int:
    return asyncio.run(run(parse_args()))


if __name__ == "__main__":
    run_main(main)
