"""Load for an OpenAI server: how fast do answers begin, how evenly do they flow, how many keep a promise.

    python -m benchmarks.load --url http://127.0.0.1:10820/v1 --concurrency 8            # closed loop: 8 clients
    python -m benchmarks.load --url http://127.0.0.1:10820/v1 --rate 2                   # open loop: Poisson arrivals

A closed loop asks again as soon as it is answered. An open loop sends each request at its own moment, drawn before the
run, however late the server is; times are counted from that moment, so a server that stalls cannot hide it. Streams
chat completions of random words; the key is read from API_KEY. Prints a table; --plot writes a picture.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.load_report import Record, draw, summary, table
from finetune.errors import UserError, run_main
from llm_code.module_interface.addresses import server_url
from llm_code.service.settings import own_key

WORDS = "今天 天气 学习 心情 工作 压力 朋友 时间 睡眠 问题 the of a model answers people with words and numbers".split()


@dataclass(frozen=True)
class Job:
    """One request: a prompt of about `num_prompt_tokens` tokens, an answer of exactly `max_tokens`."""

    number: int
    num_prompt_tokens: int
    max_tokens: int


class Target(Protocol):
    """Something that answers: calls `note` at every piece of text, returns the number of tokens; raises on an error."""

    async def ask(self, job: Job, note: Callable[[], None]) -> int: ...


class HttpTarget:
    """An OpenAI server."""

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(headers=headers, timeout=600, limits=limits, trust_env=False)
        self.url, self.model = url.rstrip("/"), model

    async def find_model(self) -> None:
        """Ask for the served model's name unless it was given. Raises UserError when nobody answers."""
        import httpx

        try:
            reply = await self.client.get(f"{self.url}/models")
            reply.raise_for_status()
            self.model = self.model or reply.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise UserError(f"expected an OpenAI server at {self.url}, found none: {error}") from None

    async def ask(self, job: Job, note: Callable[[], None]) -> int:
        """Stream one chat completion. Raises RuntimeError for a refusal and for an error in the stream."""
        from llm_code.module_interface.event_data import DONE, event_data

        body = {"model": self.model, "messages": [{"role": "user", "content": words(job)}], "stream": True}
        body |= {"max_tokens": job.max_tokens, "min_tokens": job.max_tokens, "ignore_eos": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        count = 0
        async with self.client.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError(f"status {reply.status_code}")
            async for data in event_data(reply):
                if data == DONE:  # read on: only a reply read to its end leaves its connection for the next request
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(f"error in the stream: {chunk['error'].get('message')}")
                if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices", ())):
                    note()
                    count += 1
                count = (chunk.get("usage") or {}).get("completion_tokens", count)
        return count


class EngineTarget:
    """An engine in this process."""

    def __init__(self, engine: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.engine, self.prompts = engine, prompts

    async def ask(self, job: Job, note: Callable[[], None]) -> int:
        """Stream one greedy answer to the prompt of this number."""
        from llm_code.module_interface.interface import SamplingParams

        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        params = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True)
        prompt = self.prompts[job.number % len(self.prompts)]
        self.engine.submit(prompt, params, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        while True:
            event = await events.get()
            if event.text:
                note()
            if event.error:
                raise event.error
            if event.finish_reason:
                return event.num_tokens


def words(job: Job) -> str:
    """Random words, different for every request, so that no cache helps."""
    rng = random.Random(job.number)
    return f"{job.number} " + " ".join(rng.choice(WORDS) for _ in range(max(job.num_prompt_tokens // 2, 1)))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Moments of a Poisson process with `rate` arrivals a second."""
    rng, moment, moments = random.Random(seed), 0.0, []
    for _ in range(count):
        moment += rng.expovariate(rate)
        moments.append(moment)
    return moments


async def _one(target: Target, job: Job, record: Record, begin: float) -> None:
    try:
        record.num_tokens = await target.ask(job, lambda: record.moments.append(time.perf_counter() - begin))
    except Exception as error:  # every failure is a line of the table
        record.error = f"{type(error).__name__}: {error}"[:100]
    record.end = time.perf_counter() - begin


async def closed_loop(target: Target, jobs: Sequence[Job], concurrency: int) -> list[Record]:
    """`concurrency` clients, each with one request at a time."""
    begin, left, records = time.perf_counter(), list(reversed(jobs)), []

    async def client() -> None:
        while left:
            job, record = left.pop(), Record(time.perf_counter() - begin)
            records.append(record)
            await _one(target, job, record, begin)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return records


async def open_loop(target: Target, jobs: Sequence[Job], moments: Sequence[float]) -> list[Record]:
    """Every request at its moment, whether or not the ones before have been answered."""
    begin, records = time.perf_counter(), [Record(moment) for moment in moments]

    async def at(job: Job, record: Record) -> None:
        await asyncio.sleep(max(begin + record.due - time.perf_counter(), 0))
        await _one(target, job, record, begin)

    pairs: list[Awaitable[None]] = [at(job, record) for job, record in zip(jobs, records, strict=True)]
    await asyncio.gather(*pairs)
    return records


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", type=server_url, default="http://127.0.0.1:10820/v1", help="the server (default: %(default)s)"
    )
    parser.add_argument("--model", help="name of the model (default: the first one served)")
    parser.add_argument("--requests", type=int, default=64)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--concurrency", type=int, default=8, help="closed loop: clients (default: %(default)s)")
    mode.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--input_tokens", type=int, default=64, help="about so many in a prompt")
    parser.add_argument("--output_tokens", type=int, default=64, help="exactly so many in an answer")
    parser.add_argument("--good_first", type=float, default=2.0, help="goodput: seconds to the first token at most")
    parser.add_argument("--good_gap", type=float, default=0.2, help="goodput: seconds a token on average at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of an open loop")
    parser.add_argument("--plot", type=Path, help="write a picture to this file")
    return parser.parse_args()


async def run(args: argparse.Namespace) -> list[Record]:
    target = HttpTarget(args.url, args.model, own_key())
    await target.find_model()
    jobs = [Job(i, args.input_tokens, args.output_tokens) for i in range(args.requests)]
    if args.rate:
        return await open_loop(target, jobs, arrivals(len(jobs), args.rate, args.seed))
    return await closed_loop(target, jobs, args.concurrency)


def main() -> int:
    args = parse_args()
    records = asyncio.run(run(args))
    result = summary(records, args.good_first, args.good_gap)
    print(table(result, records, args.good_first, args.good_gap))
    if args.plot:
        draw(records, args.plot)
        print(f"wrote {args.plot}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    run_main(main)
