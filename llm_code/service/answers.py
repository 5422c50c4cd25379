"""The bridge from the engine's thread to the event loop: answers submitted together, read as one stream of events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

from llm_code.module_interface import interface
from llm_code.module_interface.interface import Engine, Event, SamplingParams
from llm_code.service.errors import ApiError, shutting_down

MAX_BUFFERED_EVENTS = 8192  # of a client that reads slower than the engine writes
Job = tuple[list[int], SamplingParams]


class Answers:
    """Several engine requests of one HTTP request.

    `on_end` is called on the event loop for each of them when the engine has let go of it, also after the reader left.
    """

    def __init__(self, engine: Engine, jobs: list[Job], seconds: float, on_end: Callable[[], None]) -> None:
        self.engine, self.jobs, self.on_end = engine, jobs, on_end
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._requests: list[interface.Request] = []
        self._running: set[int] = set()
        self._timer = self._loop.call_later(seconds, self._queue.put_nowait, _out_of_time(seconds))

    def start(self) -> None:
        """Submit all jobs; what could not be submitted has ended. Raises what the engine's `submit` does."""
        for index, (prompt_ids, params) in enumerate(self.jobs):
            try:
                self._running.add(index)
                self._requests.append(self.engine.submit(prompt_ids, params, on_event=partial(self._post, index)))
            except BaseException:
                for unsubmitted in range(index, len(self.jobs)):
                    self._running.discard(unsubmitted)
                    self.on_end()
                self.close()
                raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(job's index, event) until every job has ended. Raises ApiError or EngineError with the first failure."""
        for _ in range(len(self.jobs)):
            while True:
                item = await self._queue.get()
                if isinstance(item, ApiError):
                    raise item
                index, event = item
                if event.error is not None:
                    raise event.error
                if event.finish_reason == interface.CANCELLED:
                    raise shutting_down()  # nobody else cancels what is being read
                yield index, event
                if event.finish_reason is not None:
                    break

    def fail(self, error: ApiError) -> None:
        """Let the reader have this error."""
        self._queue.put_nowait(error)

    def close(self) -> int:
        """Give up what still runs; returns how many answers that were. Harmless at any time."""
        self._timer.cancel()
        unfinished = len(self._running)
        for request in self._requests if unfinished else []:
            request.cancel()
        return unfinished

    def _post(self, index: int, event: Event) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, index, event)
        except RuntimeError:
            pass  # the event loop has ended, and with it every reader

    def _receive(self, index: int, event: Event) -> None:
        if event.finish_reason is not None or event.error is not None:
            if index in self._running:
                self._running.discard(index)
                self.on_end()
        if self._queue.qsize() == MAX_BUFFERED_EVENTS:
            self._queue.put_nowait(ApiError(503, "the client reads too slowly", code="slow_client"))
        if self._queue.qsize() <= MAX_BUFFERED_EVENTS:
            self._queue.put_nowait((index, event))


def _out_of_time(seconds: float) -> ApiError:
    return ApiError(504, f"the answer was not finished within {seconds:g} seconds", code="request_timeout")
