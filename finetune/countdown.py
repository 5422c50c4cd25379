"""Progress of a loop whose end is known: done, rate and time left, on stderr."""

import sys
import time


def format_seconds(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Countdown:
    """One line that is rewritten on a terminal, a line every ten seconds and at the end in a log."""

    LOG_EVERY = 10.0  # seconds

    def __init__(self, total: int, done: int = 0, unit: str = "rows") -> None:
        self.total, self.done, self.unit = total, done, unit
        self.first = done  # rows of an earlier run say nothing about this one's rate
        self.start = self.last_shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Units done here a second."""
        return (self.done - self.first) / max(self.seconds, 1e-9)

    def advance(self, count: int) -> None:
        """`count` more are done; print if it is time to."""
        self.done += count
        finished, now = self.done >= self.total, time.monotonic()
        terminal = sys.stderr.isatty()
        if not (finished or terminal or now - self.last_shown >= self.LOG_EVERY):
            return
        self.last_shown = now
        left = f"{format_seconds(self.seconds)} taken" if finished else f"{format_seconds(self._left())} left"
        line = f"{self.done:,}/{self.total:,} {self.unit}  {self.rate:.1f} {self.unit}/s  {left}"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal and not finished else "\n", file=sys.stderr)

    def _left(self) -> float:
        return (self.total - self.done) / self.rate if self.rate else 0.0
