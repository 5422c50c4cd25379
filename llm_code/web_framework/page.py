"""The page's parts and their places. What happens on a click is in actions.py."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from llm_code.web_framework import texts

HERE = Path(__file__).parent
# Not launch(css=...): gradio rewrites its selectors, and then rules for the page as a whole do not apply.
STYLE, SCRIPT = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
HEAD = f"<style>{STYLE}</style><script>{SCRIPT}</script>"
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


@dataclass
class Parts:
    """Everything an action reads or writes."""

    chat: gr.Chatbot
    question: gr.Textbox
    status: gr.Markdown
    refusal: gr.Markdown
    picker: gr.Radio
    new: gr.Button
    delete: gr.Button
    markdown: gr.Button
    json: gr.Button
    system: gr.Textbox
    recommended: gr.Checkbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Slider
    record: gr.Textbox  # on its way to or from the browser's storage
    listing: gr.Textbox
    wanted: gr.Textbox  # id of the conversation to open
    file: gr.Textbox
    identity: gr.State  # the conversation's id
    before: gr.State  # what to go back to when the service refuses: (messages, text for the input box or None)

    @property
    def sampling(self) -> list[Any]:
        return [self.recommended, self.temperature, self.top_p, self.max_tokens]


def theme() -> gr.themes.Base:
    """Gradio's default look with the machine's own fonts: none is loaded."""
    plain = gr.themes.Default(primary_hue="teal", font=FONTS, font_mono=["ui-monospace", "monospace"])
    return plain.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")


def build_parts() -> Parts:
    """Lay out the page inside an open gr.Blocks."""
    parts: dict[str, Any] = {"identity": gr.State(None), "before": gr.State(None)}
    for name in ("record", "listing", "wanted", "file"):
        parts[name] = gr.Textbox(visible="hidden", elem_id=name)
    gr.Markdown(f"# {texts.TITLE}", elem_id="title")
    gr.Markdown(texts.NOTICE, elem_id="notice")
    with gr.Sidebar(open=False, width=280):
        parts |= _sidebar()
    parts |= _conversation()
    with gr.Accordion(texts.SETTINGS, open=False, elem_id="settings"):
        parts |= _settings()
    return Parts(**{field.name: parts[field.name] for field in fields(Parts)})


def _sidebar() -> dict[str, Any]:
    return {
        "new": gr.Button(texts.NEW, variant="primary", elem_id="new"),
        "picker": gr.Radio([], label=texts.HISTORY, elem_id="picker"),
        "delete": gr.Button(texts.DELETE, size="sm", elem_id="delete"),
        "markdown": gr.Button(texts.MARKDOWN, size="sm", elem_id="markdown"),
        "json": gr.Button(texts.JSON, size="sm", elem_id="json"),
        "kept": gr.Markdown(texts.KEPT_HERE, elem_id="kept"),
    }


def _conversation() -> dict[str, Any]:
    chat = gr.Chatbot(
        show_label=False,
        elem_id="chat",
        editable="user",
        buttons=["copy"],
        placeholder=texts.PLACEHOLDER,
        examples=[{"text": text} for text in texts.EXAMPLES],
        group_consecutive_messages=False,
    )
    return {
        "chat": chat,
        "status": gr.Markdown(elem_id="status"),
        "refusal": gr.Markdown(elem_id="refusal", visible=False),
        "question": gr.Textbox(
            show_label=False,
            placeholder=texts.QUESTION,
            elem_id="question",
            lines=1,
            max_lines=8,
            max_length=20_000,
            submit_btn=True,
            autofocus=True,
        ),
    }


def _settings() -> dict[str, Any]:
    return {
        "system": gr.Textbox(label=texts.SYSTEM, info=texts.SYSTEM_HINT, lines=2, max_length=4000, elem_id="system"),
        "recommended": gr.Checkbox(True, label=texts.RECOMMENDED, info=texts.RECOMMENDED_HINT, elem_id="recommended"),
        "temperature": gr.Slider(0, 2, 0.3, step=0.05, label=texts.TEMPERATURE, info=texts.TEMPERATURE_HINT),
        "top_p": gr.Slider(0.05, 1, 0.85, step=0.05, label=texts.TOP_P, info=texts.TOP_P_HINT),
        "max_tokens": gr.Slider(16, 2048, 1024, step=16, label=texts.MAX_TOKENS, info=texts.MAX_TOKENS_HINT),
    }
