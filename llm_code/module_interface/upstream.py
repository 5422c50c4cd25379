"""The engine behind an OpenAI-compatible server, vLLM's or any other: prompts go there as token ids, events come back.

The chat format stays ours: prompts are encoded here with the model folder's tokenizer and sent to /completions. One
thread runs all requests; a cancelled request closes its connection, which is how such a server learns of it.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import httpx

from finetune.errors import UserError
from finetune.models import load_tokenizer
from llm_code.module_interface.checks import check_request
from llm_code.module_interface.engine_base import EngineBase, recommended_params
from llm_code.module_interface.event_data import DONE, event_data
from llm_code.module_interface.interface import (
    CANCELLED,
    ERROR,
    EngineClosed,
    EngineError,
    EngineLimits,
    EngineStats,
    Event,
    QueueFull,
    SamplingParams,
    UpstreamError,
)
from llm_code.module_interface.load import EngineSettings
from llm_code.module_interface.requests import LiveRequest
from llm_code.module_interface.upstream_events import Answer, request_body

CONNECT_SECONDS = 10.0
MAX_BATCH = 256  # requests passed on at the same time, unless the settings say otherwise


class UpstreamEngine(EngineBase):
    """Implements interface.Engine. Raises UserError when nothing answers at the address."""

    def __init__(self, settings: EngineSettings) -> None:
        from transformers import AutoConfig, GenerationConfig

        folder = settings.model_name_or_path
        tokenizer, config = load_tokenizer(folder), AutoConfig.from_pretrained(folder, local_files_only=True)
        try:
            defaults = recommended_params(GenerationConfig.from_pretrained(folder, local_files_only=True))
        except OSError:  # a checkpoint without one
            defaults = SamplingParams()
        super().__init__(tokenizer, settings.model_name, defaults)
        self._url = settings.upstream_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {settings.upstream_api_key}"} if settings.upstream_api_key else {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstream", daemon=True)
        self._thread.start()
        self._tasks: dict[str, asyncio.Task] = {}
        self._accepted, self._closed, self._lock = 0, False, threading.Lock()
        self._ended: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = 0
        model = self._run(self._describe())
        self._model = model["id"]
        context = model.get("max_model_len") or model.get("context_length") or config.max_position_embeddings
        self.limits = EngineLimits(context, config.vocab_size, settings.max_batch or MAX_BATCH, settings.max_queue)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _describe(self) -> dict[str, Any]:
        """The first model the server lists."""
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits, trust_env=False)
        try:
            reply = await self._client.get(f"{self._url}/models", timeout=CONNECT_SECONDS)
            reply.raise_for_status()
            return reply.json()["data"][0]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise UserError(
                f"expected an OpenAI-compatible server at {self._url}, found none: {error or type(error).__name__}. "
                "Start it, or set UPSTREAM_URL to where it runs."
            ) from None

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[Event], None] | None = None
    ) -> LiveRequest:
        """See interface.Engine. Errors of the server arrive as the request's error."""
        max_tokens = check_request(prompt_ids, params, self.limits)
        limit = self.limits.max_batch + self.limits.max_queue
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is shutting down and accepts nothing new.")
            if self._accepted >= limit:
                raise QueueFull(f"{limit} requests run or wait already; try again later.")
            self._accepted += 1
        request = LiveRequest(on_event)
        request.started = request.submitted
        body = request_body(self._model, prompt_ids, params, max_tokens)
        request.on_cancel = lambda: self._loop.call_soon_threadsafe(self._cancel, request.id)
        self._loop.call_soon_threadsafe(self._start, request, body, Answer(len(prompt_ids), params))
        return request

    def _start(self, request: LiveRequest, body: dict[str, Any], answer: Answer) -> None:
        self._tasks[request.id] = self._loop.create_task(self._serve(request, body, answer))

    def _cancel(self, request_id: str) -> None:
        if task := self._tasks.get(request_id):
            self._loop.call_soon(task.cancel)  # cancelled before its first step it would never reach its `try`

    async def _serve(self, request: LiveRequest, body: dict[str, Any], answer: Answer) -> None:
        """Run one request to its last event, whatever happens."""
        try:
            async for event in self._events(body, answer):
                request.push(event)
            last = answer.last()
        except asyncio.CancelledError:
            last = answer.event(finish_reason=CANCELLED)
        except EngineError as error:
            last = answer.event(finish_reason=ERROR, error=error)
        except httpx.HTTPError as error:
            failure = UpstreamError(f"the upstream server does not answer: {error or type(error).__name__}")
            last = answer.event(finish_reason=ERROR, error=failure)
        except Exception as error:  # of the consumer's callback, or an answer that is no such protocol
            failure = UpstreamError(f"the upstream's answer was not understood: {type(error).__name__}: {error}")
            last = answer.event(finish_reason=ERROR, error=failure)
        with self._lock:
            self._accepted -= 1
            self._ended[last.finish_reason or ERROR] += 1
            self._prompt_tokens += answer.num_prompt_tokens
            self._generated_tokens += last.num_tokens
        self._tasks.pop(request.id, None)
        request.push(last)

    async def _events(self, body: dict[str, Any], answer: Answer) -> AsyncIterator[Event]:
        async with self._client.stream("POST", f"{self._url}/completions", json=body) as reply:
            if reply.status_code != 200:
                raise refusal(reply.status_code, await reply.aread(), reply.headers)
            async for data in event_data(reply):
                if data == DONE:
                    return
                if event := answer.read(json.loads(data)):
                    yield event

    def stats(self) -> EngineStats:
        """See interface.Engine; the cache is the server's own matter."""
        with self._lock:
            ended, accepted = dict(self._ended), self._accepted
        return EngineStats(
            alive=self._thread.is_alive(),
            running=accepted,
            waiting=0,
            cache_blocks_total=0,
            cache_blocks_used=0,
            cache_blocks_cached=0,
            block_tokens=0,
            seconds_since_step=0.0,
            requests=ended,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=0,
            generated_tokens=self._generated_tokens,
            steps=0,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """See interface.Engine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._run(self._finish(drain_seconds))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self, drain_seconds: float) -> None:
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=drain_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


def refusal(status: int, content: bytes, headers: httpx.Headers) -> UpstreamError:
    """The error of a reply that is not 200, with the server's own words."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = content.decode("utf-8", "replace")
    try:
        retry_after = float(headers["retry-after"])
    except (KeyError, ValueError):
        retry_after = None
    return UpstreamError(f"the upstream server refused ({status}): {message[:500]}", status, retry_after)
