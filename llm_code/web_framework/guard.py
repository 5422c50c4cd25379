"""Around every request of the chat page: only this machine's browser is answered, and it asks nobody else."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_code.service.settings import is_this_machine

# Whatever a model writes or a library wants: the browser asks nobody but this server.
CONTENT_SECURITY_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
REFUSAL = "This page answers only to http://127.0.0.1 and http://localhost. From elsewhere: make tunnel\n"


class Guard:
    """ASGI middleware. The page holds the service's key, so no other site may use it from the same browser."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_from_here(Headers(scope=scope)):
            return await PlainTextResponse(REFUSAL, 403)(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = CONTENT_SECURITY_POLICY
                headers["referrer-policy"] = "no-referrer"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, send_with_headers)


def is_from_here(headers: Headers) -> bool:
    """Whether a request goes to this machine by its own name, and comes from no page of elsewhere."""
    origin = headers.get("origin")
    return is_this_machine(headers.get("host", "")) and (origin is None or is_this_machine(urlsplit(origin).netloc))
