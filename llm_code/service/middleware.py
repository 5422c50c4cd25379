"""Around every request (pure ASGI, so that a client's leaving reaches the routes): limits, key, counting, log."""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_code.service.errors import ApiError, ClientGone, of_engine
from llm_code.service.http import error_reply, internal_error, log_failure
from llm_code.service.lifecycle import Lifecycle
from llm_code.service.settings import ServiceSettings, is_this_machine

CHAT_PATH = "/v1/chat/completions"
OPEN_PATHS = ("/health", "/ready")
PATHS = (*OPEN_PATHS, "/metrics", "/openapi.json", "/internal/ask", "/v1/models", "/v1/completions", CHAT_PATH)
CLIENT_LEFT = 499
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("llm_code.service.access")


class Observe:
    """The outermost layer: a request id, errors as error objects, one line of log and one count for each request."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app, self.metrics = app, lifecycle.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen = Seen(scope, self.count)
        self.metrics.in_flight += 1

        async def watched(message: Message) -> None:
            seen.note(message)
            await send(message)

        try:
            await self._answer(scope, receive, watched, seen)
        finally:
            self.metrics.in_flight -= 1
            if seen.status is None:
                self.count(scope, CLIENT_LEFT)
            self.metrics.duration.observe(time.monotonic() - seen.started)
            seen.log()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, seen: "Seen") -> None:
        try:
            await self.app(scope, receive, send)
        except ClientGone:
            seen.left = True
        except Exception as error:
            known = error if isinstance(error, ApiError) else of_engine(error)
            log_failure(error, known)
            if seen.status is None:
                await error_reply(known or internal_error())(scope, receive, send)

    def count(self, scope: Scope, status: int) -> None:
        """Before the client can see the status, so that whoever has seen it finds it counted."""
        path = scope["path"]
        known = "/v1/models/{name}" if path.startswith("/v1/models/") else path if path in PATHS else "other"
        self.metrics.requests.add(1, path=known, status=str(status))


class Seen:
    """What is known of one request's reply so far."""

    def __init__(self, scope: Scope, count: Callable[[Scope, int], None]) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.scope, self.count, self.started = scope, count, time.monotonic()
        self.status: int | None = None
        self.left = False

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
            self.count(self.scope, self.status)

    def log(self) -> None:
        """No query string, no body, no key: neither prompts nor secrets reach the log."""
        scope, milliseconds = self.scope, 1000 * (time.monotonic() - self.started)
        status = CLIENT_LEFT if self.status is None else self.status
        left, key = " client left" if self.left else "", scope.get("state", {}).get("key", "-")
        line = (scope["method"][:20], scope["path"][:200], status, left, milliseconds, key, self.request_id)
        log.info("%s %s %d%s %.0f ms key=%s id=%s", *line)


class Limits:
    """Refuse a path or headers beyond what any client needs, and end the connection that sent them."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            settings, close = self.settings, {"Connection": "close"}
            path_bytes = len(scope.get("raw_path") or b"")
            if path_bytes > settings.max_path_bytes:
                raise ApiError(414, f"expected an address of at most {settings.max_path_bytes} bytes", headers=close)
            header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
            if len(scope["headers"]) > settings.max_headers or header_bytes > settings.max_header_bytes:
                message = f"expected at most {settings.max_headers} headers of {settings.max_header_bytes} bytes in all"
                raise ApiError(431, message, headers=close)
        await self.app(scope, receive, send)


class Options:
    """OPTIONS needs no key; a browser's preflight is answered further out where origins are allowed."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self.app, self.routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return await self.app(scope, receive, send)
        methods = {"OPTIONS"}
        for route in self.routes:
            if route.matches(scope)[0] is not Match.NONE:
                methods |= route.methods or set()
        if len(methods) == 1:
            raise ApiError(404, "Not Found")
        await Response(status_code=204, headers={"Allow": ", ".join(sorted(methods))})(scope, receive, send)


class Keys:
    """A bearer token or X-Api-Key, compared by hash in constant time; scope["state"]["key"] says which key it was.

    Without keys only this machine can connect, but a page in its browser could too, under a name of its own that it
    lets point here (DNS rebinding): then the Host must be this machine's.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode("utf-8")).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            number = 0
            if scope["path"] not in OPEN_PATHS:
                number = self._number(scope) if self.digests else self._check_host(scope)
            scope.setdefault("state", {})["key"] = str(number)
        await self.app(scope, receive, send)

    def _number(self, scope: Scope) -> int:
        """The key's place in API_KEY, from 1. Raises ApiError 401."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        tokens = [value[7:].strip() for value in values if value[:7].lower() == b"bearer "]
        tokens += [value for name, value in scope["headers"] if name == b"x-api-key"]
        if len(tokens) == 1 and len(values) <= 1:
            given = hashlib.sha256(tokens[0]).digest()
            matches = [hmac.compare_digest(given, digest) for digest in self.digests]  # all of them, always
            if any(matches):
                return matches.index(True) + 1
        message = "expected one valid key: Authorization: Bearer <key>"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    @staticmethod
    def _check_host(scope: Scope) -> int:
        host = Headers(scope=scope).get("host", "")
        if not is_this_machine(host):
            message = f"without API_KEY this service answers only to localhost and 127.0.0.1, not to {host[:100]!r}"
            raise ApiError(403, message, code="unknown_host")
        return 0
