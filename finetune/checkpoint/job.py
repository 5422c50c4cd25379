"""One conversion: what, from where, to where."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.errors import UserError


def print_progress(text: str) -> None:
    """A progress line to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Job:
    """A conversion; `layout` is the module that knows the source's names, `config` the source's config.json."""

    layout: ModuleType
    config: dict[str, Any]
    source: Path
    target: Path
    keep_original: bool
    report: Callable[[str], None]

    @property
    def partial(self) -> Path:
        """Where the target grows until it is complete."""
        return self.target.with_name(self.target.name + ".partial")


@contextmanager
def only_one(source: Path) -> Iterator[None]:
    """Hold a lock on the source folder, which the kernel frees on any end.

    Raises UserError if another process has it.
    """
    descriptor = os.open(source, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is converting {source}. Wait for it, or stop it first.") from None
        yield
    finally:
        os.close(descriptor)
