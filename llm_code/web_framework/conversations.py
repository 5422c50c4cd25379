"""What a conversation is and what can be done to it: pure functions on lists of role/content messages.

A record is a conversation as the browser keeps it: {"id", "title", "time", "system", "messages"}, `time` in
milliseconds since 1970, as JavaScript counts.
"""

import datetime
import json
import time
from typing import Any

from llm_code.web_framework import texts

Message = dict[str, str]
TITLE_LENGTH = 18


def plain(history: list[dict[str, Any]]) -> list[Message]:
    """The chat window's messages, whose contents may come in parts, as role and text."""
    return [{"role": message["role"], "content": text_of(message["content"])} for message in history or []]


def text_of(content: Any) -> str:
    """The text of a content: a string, a part {"text": ...} or a list of them."""
    if isinstance(content, list):
        return "".join(map(text_of, content))
    return content.get("text", "") if isinstance(content, dict) else str(content or "")


def up_to_question(history: list[Message], index: int) -> tuple[list[Message], str]:
    """Everything before the question that message `index` is or answers, and that question."""
    while index > 0 and history[index]["role"] != "user":
        index -= 1
    return history[:index], history[index]["content"]


def to_send(history: list[Message], system: str | None, dropped_turns: int = 0) -> list[Message]:
    """The messages of a request, without the oldest turns and without answers that stayed empty."""
    head = [{"role": "system", "content": system.strip()}] if system and system.strip() else []
    return head + [message for message in history[2 * dropped_turns :] if message["content"]]


def title_of(messages: list[Message]) -> str:
    """The first question, cut."""
    first = next((" ".join(message["content"].split()) for message in messages if message["role"] == "user"), "")
    return first if len(first) <= TITLE_LENGTH else first[: TITLE_LENGTH - 1] + "…"


def record_of(identity: str, messages: list[Message], system: str | None) -> dict[str, Any]:
    """The record of a conversation, as of now."""
    return {
        "id": identity,
        "title": title_of(messages) or texts.UNTITLED,
        "time": int(time.time() * 1000),
        "system": system or "",
        "messages": messages,
    }


def read_record(text: str | None) -> dict[str, Any] | None:
    """A record as the browser gives it back; None where it holds none that this page wrote."""
    try:
        record = json.loads(text or "")
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
        return {"id": str(record["id"]), "system": str(record["system"]), "messages": messages}
    except (ValueError, LookupError, TypeError):
        return None


def as_markdown(messages: list[Message], system: str | None) -> str:
    """The conversation to read."""
    names = {"user": texts.USER, "assistant": texts.ASSISTANT}
    parts = [f"# {title_of(messages) or texts.UNTITLED}", f"{datetime.datetime.now():%Y-%m-%d %H:%M}"]
    parts += [f"> {texts.SYSTEM}：{system.strip()}"] if system and system.strip() else []
    parts += [f"**{names[message['role']]}**\n\n{message['content']}" for message in messages]
    return "\n\n".join(parts) + "\n"


def as_json(messages: list[Message], system: str | None) -> str:
    """The conversation as a training row in OpenAI's format, with the time it was exported."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"exported": now, "messages": to_send(messages, system)}, ensure_ascii=False, indent=2) + "\n"
