"""A request to stop: SIGTERM, SIGINT and SIGHUP are noted while training, obeyed when the update in hand is done.

A terminal that went away (SIGHUP) asks for the same as SIGTERM, unless the program was begun with SIGHUP ignored
(nohup). Exit status afterwards: 128 + signal, 143 for SIGTERM and SIGHUP, 130 for SIGINT.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Launchers and terminals deliver one Ctrl-C several times at once; only a later one means impatience.
IMPATIENCE_SECONDS = 3.0


class StopRequest:
    """`signal`: the first stop signal received, SIGTERM for SIGHUP, 0 for none."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler. A second Ctrl-C some seconds later gives up at once: KeyboardInterrupt."""
        if self.signal and number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            meant = signal.SIGTERM if number == signal.SIGHUP else number
            self.signal, self._since = int(meant), time.monotonic()
            silence_lost_output()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                with suppress(OSError):
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
        hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        numbers = [number for number in STOPPING if number != signal.SIGHUP or hangs_up]
        previous = {number: signal.signal(number, self.note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def silence_lost_output(descriptors: tuple[int, ...] = (1, 2)) -> bool:
    """Turn output that nobody can receive any more to /dev/null; returns whether there was any.

    After a hang-up each line written to the terminal, or to a pipe whose reader is gone, raises OSError: the lines of
    the last update would end the program before its checkpoint is saved.
    """
    was_lost = False
    for descriptor in descriptors:
        poll = select.poll()
        poll.register(descriptor, 0)  # errors are reported whatever is asked for
        if any(found & select.POLLERR for _, found in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            was_lost = True
    return was_lost
