"""What happens on the page: the function behind each event. events.py connects them."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

import gradio as gr

from llm_code.web_framework import texts
from llm_code.web_framework.conversations import (
    Message,
    as_json,
    as_markdown,
    plain,
    read_record,
    record_of,
    text_of,
    title_of,
    up_to_question,
)
from llm_code.web_framework.service import Refused, Service

Before = tuple[list[Message], str | None]  # what to go back to: messages, text for the input box
BUSY_BOX = {"submit_btn": False, "stop_btn": True}
READY_BOX = {"submit_btn": True, "stop_btn": False}


def packed(value: Any) -> str:
    """JSON for page.js."""
    return json.dumps(value, ensure_ascii=False)


def begin(messages: list[Message], question: str, before: Before, system: str, identity: str | None) -> tuple:
    """Show a question, have the browser keep it, make the send button a stop button. Values for Events.begun."""
    messages, identity = [*messages, {"role": "user", "content": question}], identity or uuid.uuid4().hex
    record = packed(record_of(identity, messages, system))
    return messages, gr.Textbox(**BUSY_BOX), "", gr.Markdown(visible=False), before, identity, record


def send(question: str, chat: list[Any], system: str, identity: str | None) -> tuple:
    if not question.strip():
        return (gr.skip(),) * 7
    history = plain(chat)
    chat, _, *rest = begin(history, question, (history, question), system, identity)
    return chat, gr.Textbox(value="", **BUSY_BOX), *rest


def send_example(chat: list[Any], system: str, identity: str | None, event: gr.SelectData) -> tuple:
    return send(event.value["text"], chat, system, identity)


def retry(chat: list[Any], system: str, identity: str | None, event: gr.RetryData) -> tuple:
    messages = plain(chat)
    earlier, question = up_to_question(messages, event.index)
    return begin(earlier, question, (messages, None), system, identity)


def edit(chat: list[Any], system: str, identity: str | None, event: gr.EditData) -> tuple:
    messages, question = plain(chat), text_of(event.value)
    messages[event.index]["content"] = text_of(event.previous_value)
    if not question.strip():  # the browser shows it empty already
        return messages, *(gr.skip(),) * 6
    return begin(messages[: event.index], question, (messages, question), system, identity)


def undo(chat: list[Any], event: gr.UndoData) -> tuple:
    """Take the last question and its answer back: the question returns to the input box."""
    return *up_to_question(plain(chat), event.index), ""


def finish(chat: list[Any], question: str, system: str, identity: str | None, before: Before | None) -> tuple:
    """After the last word or a stop: the chat, the box, and the record.

    Without an answer the chat is what it was before the question, the retry or the edit, and the box has the question.
    """
    messages, box = plain(chat), gr.Textbox(**READY_BOX)
    if messages and messages[-1]["role"] == "user":
        messages, unanswered = before or (messages[:-1], messages[-1]["content"])
        box = gr.Textbox(value=question or unanswered or "", **READY_BOX)
    record = packed(record_of(identity, messages, system)) if identity else ""
    return messages, box, record


def show_list(record: str, listing: str, identity: str | None) -> Any:
    """The conversations the browser keeps, this one marked."""
    choices = [(title, kept) for title, kept in json.loads(listing)]
    known = identity if identity in [kept for _, kept in choices] else None
    return gr.Radio(choices=choices, value=known)


def show(record: str, listing: str, wanted: str | None = None) -> tuple:
    """Open a record of the browser; an empty page where there is none. Values for Events.shown."""
    found = read_record(record) or {"id": None, "messages": [], "system": ""}
    messages, question = found["messages"], ""
    if messages and messages[-1]["role"] == "user":  # the page was left before the answer
        question = messages.pop()["content"]
    box = gr.Textbox(value=question, **READY_BOX)
    picker = show_list(record, listing, found["id"])
    return messages, box, found["system"], found["id"], picker, gr.Markdown(visible=False), ""


def export(form: str, chat: list[Any], system: str) -> str:
    """A file for the browser to save, as JSON for page.js."""
    messages = plain(chat)
    make, suffix, kind = {
        "markdown": (as_markdown, "md", "text/markdown"),
        "json": (as_json, "json", "application/json"),
    }[form]
    name = f"{title_of(messages) or texts.UNTITLED}.{suffix}".replace("/", "_")
    return packed({"name": name, "type": f"{kind};charset=utf-8", "text": make(messages, system)})


def note_feedback(path: Path, chat: list[Any], system: str, identity: str | None, event: gr.LikeData) -> None:
    """Add a liked or disliked answer, its question and what went before to a file of JSON lines."""
    messages = plain(chat)[: event.index + 1]
    verdict = {True: "like", False: "dislike"}.get(event.liked, "none")  # none: taken back
    line = {"time": round(time.time(), 3), "conversation": identity, "verdict": verdict}
    line |= {"system": system, "messages": messages}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    gr.Info(texts.THANKS, duration=2)


async def greet(service: Service) -> str:
    """The status line of a fresh page: which model answers, or what to start."""
    try:
        return texts.MODEL.format(model=await service.model())
    except Refused as error:
        return str(error)


def stopped(line: str) -> str:
    return f"{line} · {texts.STOPPED}"
