"""The page's side of the OpenAI protocol: one streamed answer from the service's /v1, or a reason in plain words."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from llm_code.service.event_stream import BrokenOff, chunks
from llm_code.web_framework import texts

Message = dict[str, str]
TOO_LONG = "context_length_exceeded"  # the protocol's code
# No limit on the wait for the next token: a queue may be long. Connecting to a service that runs takes no time.
TIMEOUT = httpx.Timeout(None, connect=5.0)


class Refused(Exception):
    """The service did not begin an answer; the text tells the person why. `code` is the protocol's."""

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Progress:
    """How an answer comes along. Times in seconds since the question was sent."""

    started: float
    text: str = ""
    num_tokens: int = 0  # pieces received, until the service tells the number
    first: float = 0.0
    elapsed: float = 0.0
    finish_reason: str | None = None

    @property
    def speed(self) -> float:
        """Tokens per second after the first one; over everything where there is just one."""
        rest = self.elapsed - self.first
        return (self.num_tokens - 1) / rest if self.num_tokens > 1 and rest > 0 else self.num_tokens / self.elapsed

    def add(self, chunk: dict[str, Any]) -> bool:
        """Take in one chunk of the stream; True when there is something new to show."""
        self.elapsed = max(time.monotonic() - self.started, 1e-6)
        for choice in chunk.get("choices") or []:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if piece := (choice.get("delta") or {}).get("content"):
                self.first = self.first or self.elapsed
                self.text += piece
                self.num_tokens += 1
        if usage := chunk.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        return bool(self.text)


class Service:
    """A service at `url` (it ends in /v1), spoken to with `key` where it asks for one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        # The service is on this machine or in a tunnel: a proxy of the environment is not on the way to it.
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=TIMEOUT, trust_env=False, limits=httpx.Limits(max_connections=None)
        )

    async def model(self) -> str:
        """The name of the model it serves. Raises Refused."""
        try:
            answer = await self._client.get(f"{self.url}/models", timeout=5.0)
            if answer.status_code != 200:
                raise refusal(answer.status_code, answer.headers, answer.content)
            return answer.json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise Refused(texts.NO_SERVICE.format(url=self.url)) from error

    async def stream(self, messages: list[Message], sampling: dict[str, Any]) -> AsyncIterator[Progress]:
        """The answer as it grows. Leaving the iteration closes the connection, which stops the engine.

        Raises Refused before the first piece, BrokenOff after it.
        """
        body = {"model": await self.model(), "messages": messages, "stream": True, **sampling}
        body["stream_options"] = {"include_usage": True}
        progress = Progress(time.monotonic())
        try:
            async with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise refusal(answer.status_code, answer.headers, await answer.aread())
                async for chunk in chunks(answer):
                    if progress.add(chunk):
                        yield progress
        except httpx.HTTPError as error:
            raise failure(progress, str(error) or type(error).__name__) from error
        except BrokenOff as error:
            raise failure(progress, str(error)) from error
        if not progress.finish_reason:
            raise failure(progress, "the stream ended early")
        if not progress.text:
            raise Refused(texts.EMPTY)


def failure(progress: Progress, message: str) -> Exception:
    """An answer that has begun is broken off, any other was refused."""
    kind = BrokenOff if progress.text else Refused
    return kind(texts.BROKEN_OFF.format(message=message))


def refusal(status: int, headers: httpx.Headers, body: bytes) -> Refused:
    """What an error answer means to the person in front of the page."""
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, code = body.decode(errors="replace")[:200], None
    if status == 429:
        wait = headers.get("retry-after", "")
        seconds = texts.IN_SECONDS.format(seconds=float(wait)) if wait.isdigit() else texts.LATER
        return Refused(texts.QUEUE_FULL.format(seconds=seconds), code)
    if status == 503:
        return Refused(texts.NOT_READY, code)
    if status == 401:
        return Refused(texts.NO_KEY, code)
    if code == TOO_LONG:
        return Refused(texts.TOO_LONG_QUESTION.format(message=message), code)
    return Refused(texts.REFUSED.format(status=status, message=message), code)
