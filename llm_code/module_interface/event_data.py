"""Server-sent events, as whatever reads an OpenAI server's streams reads them."""

from collections.abc import AsyncIterator

import httpx

DONE = "[DONE]"  # the data of a stream's last event


async def event_data(answer: httpx.Response) -> AsyncIterator[str]:
    """The data of every event, DONE among them, to the end of the body. Comments and other fields are left out.

    Lines end at line feeds alone: httpx's aiter_lines also splits at U+2028, U+2029 and U+0085, which JSON leaves bare
    inside its strings.
    """
    async for line in _lines(answer):
        name, _, data = line.partition(b":")
        if name == b"data" and (text := data.decode("utf-8", "replace").strip()):
            yield text


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Lines without their ends, also the last one where it has none."""
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest
