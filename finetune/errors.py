"""Errors written for the person at the keyboard, and the one place that prints them."""

import errno
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from finetune.signals import silence_lost_output

FULL_DISK = "a disk is full (df -h shows which). Free some and run the same command again: what is complete stays."
# Of safetensors; of torch.save, whose stream cannot be written on.
FULL_DISK_WORDS = ("No space left on device", "unexpected pos", "PytorchStreamWriter failed writing", "iostream error")
NO_PLACE = (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)


class UserError(ValueError):
    """A mistake the person can mend: the text says what was expected, what was found and what to do."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main and leave: UserError -> `error: ...` and 2, Ctrl-C -> 130; bugs keep their traceback.

    A disk that is full, wherever it is found so, is no bug either, nor is a place that cannot be written, nor a reader
    of the output who has seen enough (`| head`, q in less): 141, as after SIGPIPE, nor an import that Ctrl-C broke off.
    """
    interruptions = _count_interruptions()
    try:
        status = main() or 0
        print(end="", flush=True)  # a descriptor that was closed (>&-) is no stdout to flush
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and silence_lost_output():
            sys.exit(128 + signal.SIGPIPE)
        if interruptions and isinstance(error, ImportError):  # what lazily importing packages make of Ctrl-C
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        if is_full_disk(error):
            print(f"error: {FULL_DISK}", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in NO_PLACE and error.filename:
            print(f"error: {error.filename}: {error.strerror}. Name a folder that can be written.", file=sys.stderr)
        else:
            raise
        status = 2
    sys.exit(status)


def _count_interruptions() -> list[int]:
    """A list that grows with every Ctrl-C, where Python's own handler is in place; it raises as that one does."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    return received


def is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk or a quota is behind an error; safetensors and torch.save tell of it in their text alone."""
    while error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in FULL_DISK_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
