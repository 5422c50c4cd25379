"""A small client of the service: answers streamed, retried as Retry-After says, errors in plain words."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from finetune.errors import UserError
from llm_code.service.event_stream import BrokenOff, chunks

RETRIED = (408, 429, 502, 503)
GATEWAYS = (502, 503, 504)  # a proxy says so with a page
CONNECT_SECONDS, SILENCE_SECONDS = 5.0, 300.0  # a queued answer is silent for long; SSE comments end the silence


class Refused(UserError):
    """The service's error reply, or that there is none. `code`: the protocol's, such as context_length_exceeded."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Client:
    """`patience`: seconds to go on trying while the service is busy, loading or away."""

    url: str
    key: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # max_tokens, temperature, ...
    patience: float = 120.0

    async def __aenter__(self) -> "Client":
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS, pool=None)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, limits=httpx.Limits(), trust_env=False
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def stream(self, messages: Sequence[Mapping[str, str]]) -> AsyncIterator[str]:
        """Pieces of the answer. Raises Refused; an answer that has begun is not tried again."""
        body = {"messages": list(messages), "stream": True, **self.options}
        loop = asyncio.get_running_loop()
        end, attempt = loop.time() + self.patience, 0
        while True:
            try:
                async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                    if response.status_code == 200:
                        async with aclosing(_pieces(response)) as pieces:
                            async for piece in pieces:
                                yield piece
                        return
                    await response.aread()
                    wait = _wait_of(response, attempt)
                    refusal = _refusal(response)
            except httpx.ConnectError:
                wait = _growing(attempt)
                refusal = Refused(f"nobody answers at {self.url}. Start the service: make baichuan-serve")
            except httpx.HTTPError as error:
                raise Refused(f"the connection to {self.url} broke: {type(error).__name__}") from None
            if wait is None or loop.time() + wait > end:
                raise refusal
            await asyncio.sleep(wait)
            attempt += 1

    async def answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The whole answer."""
        async with aclosing(self.stream(messages)) as pieces:
            return "".join([piece async for piece in pieces])


async def _pieces(response: httpx.Response) -> AsyncIterator[str]:
    """The texts in a stream of events. Raises Refused for an error event and for an end without a finish_reason."""
    finished = False
    try:
        async with aclosing(chunks(response)) as events:
            async for event in events:
                for choice in event["choices"]:
                    finished = finished or choice["finish_reason"] is not None
                    if text := choice["delta"].get("content"):
                        yield text
    except BrokenOff as error:
        raise Refused(str(error)) from error
    if not finished:
        raise Refused("the answer broke off")


def _wait_of(response: httpx.Response, attempt: int) -> float | None:
    """Seconds until the next try; None where there is no use in one."""
    if response.status_code not in RETRIED or response.headers.get("x-should-retry") == "false":
        return None
    given = response.headers.get("Retry-After", "")
    # A little apart, so that those refused together don't come back together.
    return float(given) * random.uniform(1.0, 1.25) if given.isdigit() else _growing(attempt)


def _growing(attempt: int) -> float:
    return min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.0)


def _refusal(response: httpx.Response) -> Refused:
    message, code = response.text[:200] or "no explanation", None
    if message.lstrip().startswith("<") and response.status_code not in GATEWAYS:
        message = f"with a page, so something else than the service listens at {response.url.netloc.decode()}"
    with suppress(ValueError, KeyError, TypeError):
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    hint = " Set API_KEY to the key of the service." if response.status_code == 401 else ""
    return Refused(f"the service answered {response.status_code}: {message.rstrip('.')}.{hint}", code)
