"""The consumer's end of an answer: events collected for iteration, or handed to a callback; the same for any engine."""

import itertools
import queue
import time
from collections.abc import Callable, Iterator

from llm_code.module_interface.interface import CANCELLED, Completion, EngineError, Event

_numbers = itertools.count(1)


class LiveRequest:
    """A running answer. The engine calls `push`; `cancel` runs the function the engine gave."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.id = f"request-{next(_numbers)}"
        self.submitted = time.monotonic()
        self.started: float | None = None  # left the queue
        self.first_token: float | None = None
        self.finished: float | None = None
        self.on_cancel: Callable[[], None] = lambda: None
        self._on_event = on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def push(self, event: Event) -> None:
        """Deliver an event; what a callback raises is the caller's to handle."""
        now = time.monotonic()
        if self.first_token is None and event.num_tokens:
            self.first_token = now
        if event.finish_reason:
            self.finished = now
        (self._on_event or self._events.put)(event)

    def __iter__(self) -> Iterator[Event]:
        return self._iterate(None)

    def _iterate(self, timeout: float | None) -> Iterator[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                event = self._events.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError(f"{self.id} did not end within {timeout} seconds") from None
            if event.error:
                raise event.error
            yield event
            if event.finish_reason:
                return

    def result(self, timeout: float | None = None) -> Completion:
        """Collect all events. Raises the request's EngineError, TimeoutError after `timeout` seconds."""
        return collect(self._iterate(timeout))

    def cancel(self) -> None:
        """End the answer early; the last event says CANCELLED. Harmless at any time."""
        self.on_cancel()


def collect(events: Iterator[Event]) -> Completion:
    """All events of one answer as a Completion."""
    parts: list[Event] = list(events)
    if not parts:
        raise EngineError("the answer ended without an event")
    last = parts[-1]
    return Completion(
        text="".join(event.text for event in parts),
        tokens=tuple(token for event in parts for token in event.tokens),
        finish_reason=last.finish_reason or CANCELLED,
        stop_reason=last.stop_reason,
        prompt_tokens=tuple(token for event in parts for token in event.prompt_tokens),
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        num_tokens=last.num_tokens,
    )
