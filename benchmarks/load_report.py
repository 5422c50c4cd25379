"""What a run of requests says: percentiles, rates, goodput, as a table and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PERCENTILES = (50, 90, 99)


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
