"""A request to stop: SIGTERM and SIGINT are noted while training and obeyed when the update in hand is done.

Exit status afterwards: 128 + signal, 143 for SIGTERM and 130 for SIGINT.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)
# Launchers and terminals deliver one Ctrl-C several times at once; only a later one means impatience.
IMPATIENCE_SECONDS = 3.0


class StopRequest:
    """The first stop signal received, 0 for none."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler. A second Ctrl-C some seconds later gives up at once: KeyboardInterrupt."""
        if self.signal and number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = int(number), time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                print(
                    f"{name}: the update in hand is finished and saved, then training stops",
                    file=sys.stderr,
                    flush=True,
                )

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note stop signals inside the block; outside it they end the process as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self.note) for number in STOPPING}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
