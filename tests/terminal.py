"""A program on a pseudo-terminal, and a tiny model that does not end its replies by itself."""

import json
import os
import pty
import select
import shutil
import time
from pathlib import Path


def without_end(source: Path, folder: Path, unlikely_id: int, unlikely_token: str) -> Path:
    """A copy of a tiny model whose end token is another one, so that a reply lasts as long as it may."""
    shutil.copytree(source, folder)
    changes = {"generation_config.json": {"eos_token_id": [unlikely_id]}, "config.json": {"eos_token_id": unlikely_id}}
    changes["tokenizer_config.json"] = {"eos_token": unlikely_token}
    for name, change in changes.items():
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**settings, **change}), encoding="utf-8")
    return folder


class Terminal:
    """A program on a pseudo-terminal, typed at and read as a person would."""

    def __init__(self, arguments):
        self.process, self.fd = pty.fork()
        if self.process == 0:
            os.execv(arguments[0], arguments)
        self.seen = ""

    def wait_for(self, text, timeout=120):
        """Read until `text` comes behind what was waited for before."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            assert select.select([self.fd], [], [], end - time.monotonic())[0], f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, self.seen = self.seen.split(text, 1)
        return before

    def wait_for_more(self, length, timeout=120):
        """Read until so many characters came behind what was waited for."""
        end = time.monotonic() + timeout
        while len(self.seen) < length:
            assert select.select([self.fd], [], [], end - time.monotonic())[0], f"only {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")

    def interrupt_until(self, text):
        """Ctrl-C, and again: one between readline's prompt and its waiting is seen with the next key only."""
        while text not in self.seen:
            self.type("\x03")
            if select.select([self.fd], [], [], 2)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        self.wait_for(text)

    def type(self, text):
        os.write(self.fd, text.encode())

    def status(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
