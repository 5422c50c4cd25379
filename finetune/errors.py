"""Errors written for the person at the keyboard, and the one place that prints them."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A mistake the person can mend: the text says what was expected, what was found and what to do."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main and leave: UserError -> `error: ...` and 2, Ctrl-C -> 130; bugs keep their traceback."""
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
