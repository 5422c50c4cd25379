"""uvicorn's HTTP/1.1 connections with clocks and bounds of their own.

uvicorn limits neither the time a request takes to arrive (Kludex/uvicorn#157) nor the time a reply waits for its
reader, and leaves a connection that never sends anything open for good.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm_code.service.errors import invalid
from llm_code.service.settings import ServiceSettings


class BoundedConnection(H11Protocol):
    """`settings` and `on_refused` (reason, HTTP status or None) are set by `connection_class`."""

    settings: ServiceSettings
    on_refused: Callable[[str, int | None], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receipt: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self.on_refused("connections", None)
            transport.abort()
            return
        wait = self.settings.keep_alive_seconds
        self.timeout_keep_alive_task = self.loop.call_later(wait, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receipt, self._stall, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._receipt is None and self._expects_more():
            self._receipt = self.loop.call_later(self.settings.receipt_seconds, self._end, "receipt_deadline")
        super().data_received(data)
        self._disarm_receipt()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        pending = bool(self.conn.trailing_data[0]) and self._expects_more()
        if pending and self._receipt is None:  # the next request's beginning came with the last one
            self._receipt = self.loop.call_later(self.settings.receipt_seconds, self._end, "receipt_deadline")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.settings.stall_seconds, self._end, "stalled_reader")

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """The parser's refusal as an error object; uvicorn's is plain text."""
        self.on_refused("parser", 400)
        body = json.dumps(invalid("expected a valid HTTP/1.1 request with headers of ordinary size").content()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:
            pass  # a reply was under way already
        self.transport.close()

    def _expects_more(self) -> bool:
        """A request is due or under way, not wholly received."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _disarm_receipt(self) -> None:
        between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if self._receipt is not None and (between or not self._expects_more()):
            self._receipt.cancel()
            self._receipt = None

    def _end(self, reason: str) -> None:
        self.on_refused(reason, None)
        self.transport.abort()


def connection_class(
    settings: ServiceSettings, on_refused: Callable[[str, int | None], None]
) -> type[BoundedConnection]:
    """The class uvicorn makes a connection of."""
    bound = {"settings": settings, "on_refused": staticmethod(on_refused)}
    return type("ServiceConnection", (BoundedConnection,), bound)
