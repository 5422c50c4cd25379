"""HTTP pieces the routes share: the body within its limits, JSON and event-stream replies, clients that leave."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llm_code.service.errors import ApiError, ClientGone, invalid, of_engine
from llm_code.service.replies import Reply
from llm_code.service.strict_json import JsonError, parse

STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
COMMENT, DONE = b": keep-alive\n\n", b"data: [DONE]\n\n"
SMALL = 1 << 16  # bytes whose parsing holds nobody up
Result = TypeVar("Result")
log = logging.getLogger(__name__)


async def read_json(request: Request, max_bytes: int) -> Any:
    """The request's JSON. Raises ApiError 413, 415 or 400, the first as soon as it is certain; ClientGone."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps a page in a browser from posting here unasked
        raise ApiError(415, "expected Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "expected a body without Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = await _read(request.receive, max_bytes)
    try:
        return parse(body) if len(body) < SMALL else await asyncio.to_thread(parse, body)
    except JsonError as error:
        raise invalid(str(error)) from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"expected a body of at most {max_bytes} bytes")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled, and ClientGone raised, when the client closes its connection.

    The body must have been read. A client that closes only its sending side counts as gone: the two look alike.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGone
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_reply(reply: Reply, status: int = 200) -> Response:
    return Response(reply.to_json(), status, media_type="application/json")


def error_reply(error: ApiError) -> Response:
    return JSONResponse(error.content(), error.status, headers=error.headers)


class EventStream(Response):
    """Replies as server-sent events, ended by [DONE]. An error before the first of them is an ordinary error reply;
    a later one is an event with an `error` object. A silent stream gets a comment now and then."""

    def __init__(self, replies: AsyncGenerator[Reply, None], comment_seconds: float) -> None:
        super().__init__(headers={**STREAM_HEADERS, "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.replies, self.comment_seconds = replies, comment_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.replies) as replies:
            first = await anext(replies)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            commenter = asyncio.ensure_future(self._comment(send))
            try:
                await self._send(send, _event(first.to_json()))
                async for reply in replies:
                    await self._send(send, _event(reply.to_json()))
            except Exception as error:
                await self._send(send, _event(JSONResponse(_stream_error(error).content()).body))
            finally:
                commenter.cancel()
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self.last_sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _comment(self, send: Send) -> None:
        self.last_sent = asyncio.get_running_loop().time()
        while True:
            silent = asyncio.get_running_loop().time() - self.last_sent
            await asyncio.sleep(max(self.comment_seconds - silent, 0.01))
            if asyncio.get_running_loop().time() - self.last_sent >= self.comment_seconds:
                await self._send(send, COMMENT)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _stream_error(error: Exception) -> ApiError:
    known = error if isinstance(error, ApiError) else of_engine(error)
    log_failure(error, known)
    return known or internal_error()


def log_failure(error: Exception, known: ApiError | None) -> None:
    """What the reply does not tell: a bug's traceback, the engine's own words."""
    if known is None:
        log.error("a request failed", exc_info=error)
    elif known.status in (500, 502):
        log.error("a request failed: %s: %s", type(error).__name__, error)


def internal_error() -> ApiError:
    return ApiError(500, "the service failed on this request; the log has the reason", code="internal_error")
