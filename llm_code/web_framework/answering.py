"""One answer on the page: what is shown while it comes, when it ends, and when the service refuses."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from llm_code.web_framework import texts
from llm_code.web_framework.conversations import Message, plain, to_send
from llm_code.web_framework.service import TOO_LONG, BrokenOff, Progress, Refused, Service

# Between two looks at a silent service. Gradio notices that a page was closed only when there is something to send.
HEARTBEAT_SECONDS = 1.0
SHOWN_PER_SECOND = 12  # a redraw costs the browser more than a token costs a fast engine


async def with_heartbeat(stream: AsyncIterator[Progress]) -> AsyncIterator[Progress | None]:
    """The stream's items, and None for every second without one."""
    step = None
    try:
        while True:
            step = step or asyncio.ensure_future(anext(stream))
            done, _ = await asyncio.wait([step], timeout=HEARTBEAT_SECONDS)
            if not done:
                yield None
                continue
            finished, step = step, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if step is not None:
            step.cancel()
            await asyncio.wait([step])
        await stream.aclose()


async def stream_fitting(
    service: Service, history: list[Message], system: str | None, sampling: dict[str, Any]
) -> AsyncIterator[tuple[Progress, int]]:
    """Progress and the number of oldest turns left out until the service found room for the rest."""
    dropped = 0
    while True:
        stream = service.stream(to_send(history, system, dropped), sampling)
        try:
            async for progress in stream:
                yield progress, dropped
            return
        except Refused as error:
            if error.code != TOO_LONG or 2 * (dropped + 1) >= len(history):
                raise
            dropped += 1
        finally:
            await stream.aclose()


def chosen_sampling(recommended: bool, temperature: float, top_p: float, max_tokens: int) -> dict[str, Any]:
    """The sampling fields of a request; none but the length where the model's own settings are wanted."""
    chosen = {} if recommended else {"temperature": temperature, "top_p": top_p}
    return {"max_tokens": int(max_tokens), **chosen}


async def answer(
    service: Service, chat: list[Any], before: tuple[list[Message], str | None] | None, system: str, *sampling: Any
) -> AsyncIterator[tuple[Any, Any, Any, Any]]:
    """Values for the chat, the status line, the refusal and the input box, again and again until the answer is whole.

    On a refusal the chat goes back to what it was before the question, and the question goes back into the box.
    """
    history, same, seconds, shown, progress = plain(chat), gr.skip(), 0.0, 0.0, None
    if not history or history[-1]["role"] != "user":
        yield same, same, same, same  # after a generator that says nothing, gradio empties its outputs
        return
    items = with_heartbeat(stream_fitting(service, history, system, chosen_sampling(*sampling)))
    try:
        async for item in items:
            if item is None and progress is None:
                seconds += HEARTBEAT_SECONDS
            elif item is not None:
                progress, dropped = item
                if progress.elapsed - shown < 1 / SHOWN_PER_SECOND and progress.finish_reason is None:
                    continue
                shown = progress.elapsed
            yield said(history, progress), status(progress, seconds), same, same
        yield said(history, progress), outcome(progress, dropped), same, same
    except BrokenOff as error:
        yield said(history, progress), f"{error}", same, same
    except Refused as error:
        messages, text = before or (history[:-1], history[-1]["content"])
        yield messages, "", gr.Markdown(str(error), visible=True), same if text is None else text
    finally:
        await items.aclose()


def said(history: list[Message], progress: Progress | None) -> list[Message]:
    """The conversation with as much of the answer as there is."""
    return history + ([{"role": "assistant", "content": progress.text}] if progress else [])


def status(progress: Progress | None, seconds: float) -> str:
    """The line under an answer that is still coming."""
    if progress is None:
        return texts.WAITING.format(seconds=seconds)
    return texts.RUNNING.format(tokens=progress.num_tokens, speed=progress.speed)


def outcome(progress: Progress, dropped_turns: int) -> str:
    """The line under a whole answer."""
    line = texts.DONE.format(tokens=progress.num_tokens, speed=progress.speed, first=progress.first)
    if progress.finish_reason == "length":
        line += texts.TOO_LONG
    return line + (f" · {texts.DROPPED.format(turns=dropped_turns)}" if dropped_turns else "")
