"""How many answers may run and wait: over all, and for one key, so that one client cannot crowd out the others."""

from collections import Counter

from llm_code.service.errors import ApiError, invalid
from llm_code.service.metrics import Metrics


class Admission:
    """Counts answers from their admission to the engine's last event. Used on the event loop alone.

    `total` is what the engine computes and queues at most; `per_key` 0 means that only `total` counts.
    """

    def __init__(self, total: int, per_key: int, metrics: Metrics) -> None:
        self.total, self.per_key, self.metrics = total, per_key, metrics
        self.taken: Counter[str] = Counter()

    def take(self, key: str, count: int, param: str) -> None:
        """Admit `count` answers of a key or raise ApiError: 429, or 400 for more than there is room for at all.

        `param` is the request's field that asks for so many.
        """
        most = self.per_key or self.total
        if count > most:
            message = f"this server gives at most {most} answers at a time, {count} were asked for"
            raise invalid(f"{param}: {message}", param)
        if self.taken.total() + count > self.total:
            self._refuse("queue_full", f"the server is busy: {self.total} requests run and wait already")
        if self.per_key and self.taken[key] + count > self.per_key:
            self._refuse("key_limit", f"{self.per_key} requests of this key run and wait already")
        self.taken[key] += count

    def release(self, key: str, count: int = 1) -> None:
        self.taken[key] -= count
        if self.taken[key] <= 0:
            del self.taken[key]

    def _refuse(self, code: str, message: str) -> None:
        self.metrics.rejected.add(1, reason=code)
        raise ApiError(429, message, code=code, retry_after=1)
