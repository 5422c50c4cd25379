"""Which event calls what: each chain starts with a click and ends with the browser keeping the conversation.

A `js` runs in the browser before its function and replaces the function's inputs (page.js has what it calls).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from llm_code.web_framework import actions
from llm_code.web_framework.answering import answer
from llm_code.web_framework.page import Parts
from llm_code.web_framework.service import Service

SAVE = "(record, _, id) => [record, window.chats.save(record), id]"
SAVE_AND_OPEN = "(record, _, id) => (window.chats.save(record), [window.chats.open(id), window.chats.list(), id])"
FORGET_AND_OPEN = "(record) => (window.chats.remove(record), [window.chats.open(''), window.chats.list(), ''])"
LAST = "() => [window.chats.last(), window.chats.list(), '']"
DOWNLOAD = "(file) => window.chats.download(file)"


class Events:
    """The events of one page."""

    def __init__(self, parts: Parts, service: Service, feedback_file: Path) -> None:
        self.parts, self.service, self.feedback_file = parts, service, feedback_file
        self.running: list[Any] = []  # the answers a stop or a change of conversation cancels
        p = parts
        self.context = [p.chat, p.system, p.identity]
        self.begun = [p.chat, p.question, p.status, p.refusal, p.before, p.identity, p.record]
        self.shown = [p.chat, p.question, p.system, p.identity, p.picker, p.refusal, p.status]
        self.stored = [p.record, p.listing, p.wanted]

    def connect(self, page: gr.Blocks) -> None:
        p = self.parts
        for trigger, function, inputs in [
            (p.question.submit, actions.send, [p.question, *self.context]),
            (p.chat.example_select, actions.send_example, self.context),
            (p.chat.retry, actions.retry, self.context),
            (p.chat.edit, actions.edit, self.context),
        ]:
            self._answer(trigger, function, inputs)
        cancelled = on(p.question.stop, lambda: None, None, None, cancels=self.running)
        finished = self._finish(cancelled.then)
        self._save(finished.then)
        # Last: words of the answer that were under way when it was stopped bring a status line of their own.
        on(finished.then, actions.stopped, p.status, p.status)
        undone = on(p.chat.undo, actions.undo, p.chat, [p.chat, p.question, p.status], cancels=self.running)
        self._finish_and_save(undone.then)
        cleared = on(p.chat.clear, lambda: "", None, p.status, cancels=self.running)
        self._finish_and_save(cleared.then)
        self._history(page)
        for form, button in (("markdown", p.markdown), ("json", p.json)):
            made = on(button.click, partial(actions.export, form), [p.chat, p.system], p.file)
            on(made.then, None, p.file, None, js=DOWNLOAD)
        on(p.chat.like, self._note_feedback, self.context, None)

    def _note_feedback(self, chat: list[Any], system: str, identity: str | None, event: gr.LikeData) -> None:
        actions.note_feedback(self.feedback_file, chat, system, identity, event)

    def _answer(self, trigger: Callable[..., Any], function: Callable[..., Any], inputs: list[Any]) -> None:
        """Question, answer, kept in the browser at once and again when the answer is whole."""
        p = self.parts

        async def reply(chat, before, system, *sampling):
            async for values in answer(self.service, chat, before, system, *sampling):
                yield values

        begun = on(trigger, function, inputs, self.begun, queue=False)
        self._save(begun.then)
        inputs, outputs = [p.chat, p.before, p.system, *p.sampling], [p.chat, p.status, p.refusal, p.question]
        # Everyone's requests go to the service at once: it has the queue and says when it is full.
        answered = on(begun.then, reply, inputs, outputs, concurrency_limit=None)
        self.running.append(answered)
        self._finish_and_save(answered.then)

    def _save(self, trigger: Callable[..., Any]) -> None:
        p = self.parts
        on(trigger, actions.show_list, [p.record, p.listing, p.identity], p.picker, js=SAVE)

    def _finish(self, trigger: Callable[..., Any], **options: Any) -> Any:
        p = self.parts
        inputs, outputs = [p.chat, p.question, p.system, p.identity, p.before], [p.chat, p.question, p.record]
        return on(trigger, actions.finish, inputs, outputs, **options)

    def _finish_and_save(self, trigger: Callable[..., Any]) -> None:
        self._save(self._finish(trigger).then)

    def _history(self, page: gr.Blocks) -> None:
        """Open the conversation of before, another one or a new one; delete one."""
        p = self.parts
        opened = on(page.load, actions.show, self.stored, self.shown, js=LAST)
        on(opened.then, partial(actions.greet, self.service), None, p.status)
        for trigger, source, pick in ((p.picker.input, p.picker, "(id) => id"), (p.new.click, None, "() => ''")):
            wanted = on(trigger, None, source, p.wanted, js=pick)
            left = self._finish(wanted.then, cancels=self.running)
            on(left.then, actions.show, self.stored, self.shown, js=SAVE_AND_OPEN)
        left = self._finish(p.delete.click, cancels=self.running)
        on(left.then, actions.show, self.stored, self.shown, js=FORGET_AND_OPEN)


def on(trigger: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """An event without a spinner over the page and without an entry in an API."""
    return trigger(*arguments, show_progress="hidden", api_visibility="private", **options)
