"""The events of a streamed answer, as every program that asks the service reads them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from llm_code.module_interface.event_data import DONE, event_data


class BrokenOff(Exception):
    """The answer ended before its end; what came until then stands."""


async def chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to [DONE]. Raises BrokenOff for an error in the middle of it."""
    async for data in event_data(answer):
        if data == DONE:
            return
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise BrokenOff(f"no JSON in the stream: {data[:80]}") from error
        if problem := chunk.get("error"):
            raise BrokenOff(problem["message"] if isinstance(problem, dict) else str(problem))
        yield chunk
