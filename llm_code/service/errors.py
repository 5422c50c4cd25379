"""Every error of the service as OpenAI's error object: status, message, type, param, code."""

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from llm_code.module_interface import interface

MAX_MESSAGE = 1000
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class ApiError(Exception):
    """An error reply. `retry_after` in seconds becomes the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, shortened(message), param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))
        if status == 504:
            self.headers["x-should-retry"] = "false"  # the same request would take as long again

    def content(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request at fault."""
    return ApiError(400, message, param=param, code=code)


def shortened(text: str) -> str:
    """An error text may quote what was sent, but never echo it at length, and is always valid UTF-8."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."


def of_engine(error: Exception) -> ApiError | None:
    """The reply to an engine's error, None for what is a bug. A failed computation's own text stays in the log."""
    if isinstance(error, interface.ContextTooLong):
        return invalid(str(error), error.param, "context_length_exceeded")
    if isinstance(error, UserError):
        return invalid(str(error), getattr(error, "param", None) or "messages")
    if isinstance(error, interface.QueueFull):
        return ApiError(429, f"the server is busy: {error}", code="queue_full", retry_after=error.retry_after)
    if isinstance(error, interface.QueueTimeout):
        return ApiError(503, "the request waited too long to start", code="queue_timeout", retry_after=1)
    if isinstance(error, interface.EngineClosed):
        return shutting_down()
    if isinstance(error, interface.EngineDead):
        return engine_dead()
    if isinstance(error, interface.UpstreamError):
        return _of_upstream(error)
    if isinstance(error, interface.EngineError):
        return ApiError(500, "the computation of this request failed; others go on", code="computation_failed")
    return None


def _of_upstream(error: interface.UpstreamError) -> ApiError:
    """What the client did wrong is told with the upstream's status; the upstream's own faults are a 502."""
    passed_on = error.status in (400, 404, 413, 422, 429, 503)
    status = error.status if passed_on and error.status else 502
    message = str(error) if passed_on else "the upstream server failed"
    return ApiError(status, message, code="upstream_error", retry_after=error.retry_after)


def shutting_down() -> ApiError:
    return ApiError(503, "the service is shutting down", code="shutting_down", retry_after=5)


def engine_dead() -> ApiError:
    return ApiError(503, "the engine has stopped; the service ends", code="engine_dead", retry_after=10)


def loading() -> ApiError:
    return ApiError(503, "the model is still loading", code="loading", retry_after=5)
