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
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune.errors import UserError, run_main

WORDS = "今天 天气 学习 心情 工作 压力 朋友 时间 睡眠 问题 the of a model answers people with words and numbers".split()
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Job:
    """One request: a prompt of about `num_prompt_tokens` tokens, an answer of exactly `max_tokens`."""

    number: int
    num_prompt_tokens: int
    max_tokens: int


@dataclass
class Record:
    """What happened to a request; moments in seconds since the start of the run."""

    due: float
    moments: list[float] = field(default_factory=list)  # of each piece of text
    end: float | None = None
    num_tokens: int = 0
    error: str | None = None

    @property
    def first_token(self) -> float | None:
        return self.moments[0] - self.due if self.moments else None

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]


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
        """Stream one chat completion."""
        body = {"model": self.model, "messages": [{"role": "user", "content": words(job)}], "stream": True}
        body |= {"max_tokens": job.max_tokens, "min_tokens": job.max_tokens, "ignore_eos": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        count = 0
        async with self.client.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError(f"status {reply.status_code}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
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


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the sorted values; NaN of none."""
    if not values:
        return float("nan")
    ordered, place = sorted(values), (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def is_good(record: Record, first_seconds: float, gap_seconds: float) -> bool:
    """Whether the answer came complete, began in time, and flowed fast enough on average."""
    if record.error or record.first_token is None:
        return False
    mean = sum(record.gaps) / len(record.gaps) if record.gaps else 0.0
    return record.first_token <= first_seconds and mean <= gap_seconds


def summary(records: Sequence[Record], first_seconds: float, gap_seconds: float) -> dict[str, float]:
    """Rates over the whole run, and percentiles of the requests that were answered."""
    answered = [record for record in records if not record.error]
    seconds = max((record.end or 0.0) for record in records)
    series = {
        "ttft": [r.first_token for r in answered if r.first_token is not None],
        "itl": [gap for r in answered for gap in r.gaps],
        "latency": [r.end - r.due for r in answered],
    }
    result = {"requests": len(records), "failed": len(records) - len(answered), "seconds": seconds}
    result["requests_per_second"] = len(answered) / seconds
    result["tokens_per_second"] = sum(r.num_tokens for r in answered) / seconds
    result["goodput_per_second"] = sum(is_good(r, first_seconds, gap_seconds) for r in records) / seconds
    for name, values in series.items():
        result |= {f"{name}_p{p}": percentile(values, p) for p in PERCENTILES}
    return result


def table(result: dict[str, float], records: Sequence[Record], first_seconds: float, gap_seconds: float) -> str:
    """The summary for a person."""
    lines = [
        f"{result['requests']:.0f} requests in {result['seconds']:.1f} s, {result['failed']:.0f} failed",
        f"{result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.1f} tokens/s",
        f"goodput {result['goodput_per_second']:.2f} requests/s "
        f"(first token within {first_seconds:g} s, then {1e3 * gap_seconds:g} ms a token on average)",
        "",
        f"{'':24}" + "".join(f"{f'p{p}':>10}" for p in PERCENTILES),
    ]
    for name, title in (("ttft", "first token, ms"), ("itl", "between tokens, ms"), ("latency", "whole answer, ms")):
        lines.append(f"{title:24}" + "".join(f"{1e3 * result[f'{name}_p{p}']:10.0f}" for p in PERCENTILES))
    errors = sorted({record.error for record in records if record.error})
    return "\n".join([*lines, *(f"error: {error}" for error in errors[:5])])


def draw(records: Sequence[Record], path: Path) -> None:
    """Share of requests (tokens) by time to the first (next) token, and requests over the run."""
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    series = {"first token": [r.first_token for r in records if r.first_token is not None]}
    series["between tokens"] = [gap for r in records for gap in r.gaps]
    for axes, (title, values) in zip((left, middle), series.items(), strict=True):
        axes.plot(sorted(values), [(i + 1) / len(values) for i in range(len(values))])
        axes.set(xlabel="seconds", ylabel="share", title=title, xlim=(0, None))
    for row, record in enumerate(sorted(records, key=lambda r: r.due)):
        first = record.moments[0] if record.moments else record.end
        right.plot([record.due, first], [row, row], color="0.75")
        right.plot([first, record.end], [row, row], color="tab:red" if record.error else "tab:blue")
    right.set(xlabel="seconds", ylabel="request", title="waiting (grey), answering (blue), failed (red)")
    figure.savefig(path)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:10820/v1", help="the server (default: %(default)s)")
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
    target = HttpTarget(args.url, args.model, os.environ.get("API_KEY"))
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
