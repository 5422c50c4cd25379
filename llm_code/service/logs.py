"""One line a message on stderr, whatever a client sent: control characters escaped, long texts cut."""

import logging
import re
import sys

MAX_LINE = 2000
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class SafeFormatter(logging.Formatter):
    """Lines of a traceback are indented behind a bar, so that no text in it can pass for a line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname} {escaped(record.getMessage())}"
        if not record.exc_info:
            return head
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join([head, *(f"  | {escaped(line)}" for line in trace)])


def escaped(text: str) -> str:
    """The text on one line, control characters as \\x0a, half surrogates replaced."""
    text = text[: MAX_LINE + 1]
    text = text if len(text) <= MAX_LINE else text[:MAX_LINE] + "..."
    text = CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return text.encode("utf-8", "replace").decode("utf-8")


def set_up_logging() -> None:
    """Log to stderr; the libraries only what they warn of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("uvicorn", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
