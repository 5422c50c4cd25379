"""Counters and histograms of the service, and the engine's figures, in Prometheus' text format."""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping

from llm_code.module_interface.interface import EngineStats

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number for each combination of labels; they only grow."""

    def __init__(self, name: str, help_text: str) -> None:
        self.name, self.help_text = name, help_text
        self.values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        self.values[tuple(labels.items())] += amount

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help_text, "counter")
        for labels, value in (self.values or {(): 0.0}).items():
            yield _line(self.name, labels, value)


class Histogram:
    """How many observations, in seconds, stayed within each bound."""

    def __init__(self, name: str, help_text: str) -> None:
        self.name, self.help_text = name, help_text
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help_text, "histogram")
        reached = 0
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self.counts, strict=True):
            reached += count
            yield _line(f"{self.name}_bucket", (("le", bound),), reached)
        yield _line(f"{self.name}_sum", (), self.sum)
        yield _line(f"{self.name}_count", (), reached)


class Metrics:
    """Everything the service counts. Used on the event loop alone."""

    def __init__(self) -> None:
        self.requests = Counter("llm_requests_total", "HTTP requests by path and status; 499: the client left.")
        self.rejected = Counter("llm_rejected_total", "Requests and connections refused, by reason.")
        self.cancelled = Counter("llm_cancelled_total", "Answers given up since their client left.")
        self.prompt_tokens = Counter("llm_prompt_tokens_total", "Tokens of answered prompts.")
        self.answer_tokens = Counter("llm_answer_tokens_total", "Tokens computed for answers.")
        self.first_token = Histogram("llm_first_token_seconds", "From the request to its first text.")
        self.duration = Histogram("llm_request_seconds", "From the request to the end of its reply.")
        self.in_flight = 0

    def render(self, stats: EngineStats | None, state: str) -> str:
        """The page: the service's counters, then the engine's figures once there is an engine."""
        collected = [value for value in vars(self).values() if isinstance(value, Counter | Histogram)]
        lines = [line for metric in collected for line in metric.lines()]
        gauges: dict[str, float] = {"llm_in_flight_requests": self.in_flight, "llm_ready": state == "ready"}
        if stats is not None:
            gauges |= _engine_gauges(stats)
            lines += _counter("llm_engine_steps_total", stats.steps)
            lines += _counter("llm_engine_cached_prompt_tokens_total", stats.cached_tokens)
            lines += _engine_requests(stats.requests)
        for name, value in gauges.items():
            lines += [*_head(name, name.removeprefix("llm_").replace("_", " "), "gauge"), _line(name, (), value)]
        return "\n".join(lines) + "\n"


def _engine_gauges(stats: EngineStats) -> dict[str, float]:
    return {
        "llm_engine_alive": stats.alive,
        "llm_engine_running": stats.running,
        "llm_engine_waiting": stats.waiting,
        "llm_engine_cache_blocks": stats.cache_blocks_total,
        "llm_engine_cache_blocks_used": stats.cache_blocks_used,
        "llm_engine_cache_blocks_cached": stats.cache_blocks_cached,
        "llm_engine_seconds_since_step": stats.seconds_since_step,
    }


def _engine_requests(requests: Mapping[str, int]) -> list[str]:
    counter = Counter("llm_engine_requests_total", "Answers of the engine by the reason of their end.")
    for reason, count in requests.items():
        counter.add(count, reason=reason)
    return list(counter.lines())


def _counter(name: str, value: float) -> list[str]:
    return [*_head(name, name.removeprefix("llm_").replace("_", " "), "counter"), _line(name, (), value)]


def _head(name: str, help_text: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{inner}}} {float(value):.10g}" if inner else f"{name} {float(value):.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
