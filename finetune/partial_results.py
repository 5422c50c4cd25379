"""Finished batches of a long run on disk, one JSON line each: killed at any moment, at most one batch is lost.

The first line is the run's configuration. A run with another configuration never goes on with these results.
"""

import fcntl
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def config_hash(config: dict[str, Any]) -> str:
    """Hex digest of a configuration."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class PartialResults:
    """Batches by number, read when it is opened, appended as they come; one process at a time."""

    def __init__(self, path: str | Path, config: dict[str, Any]) -> None:
        """Raises UserError when another process is writing the same file."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = open(self.path, "a+b")  # noqa: SIM115 open until close()
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.stream.close()
            raise UserError(f"{self.path}: another run is writing these results. Wait for it or stop it.") from None
        self.batches: dict[int, list[Any]] = {}
        self._read(config)

    def _read(self, config: dict[str, Any]) -> None:
        self.stream.seek(0)
        content = self.stream.read()
        whole = content[: content.rfind(b"\n") + 1]  # the line being written at the moment of a kill has no end
        self.stream.truncate(len(whole))
        header, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        if header is not None and header["config"] == config:
            self.batches = {line["batch"]: line["results"] for line in lines}
            return
        if header is not None:
            old = header["config"]
            changed = sorted(key for key in {*old, *config} if old.get(key) != config.get(key))
            print(f"{self.path}: started anew, it is of a run with other {', '.join(changed)}", file=sys.stderr)
        self.stream.truncate(0)
        self._write({"config": config})

    def _write(self, value: dict[str, Any]) -> None:
        self.stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self.stream.flush()

    def append(self, number: int, results: list[Any]) -> None:
        """Keep the results of one batch."""
        self.batches[number] = results
        self._write({"batch": number, "results": results})

    def close(self) -> None:
        """Let go of the file; the results stay."""
        self.stream.close()

    def remove(self) -> None:
        """The results are in their final place: the partial file goes."""
        self.path.unlink(missing_ok=True)
        self.close()
