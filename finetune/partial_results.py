"""Finished batches of a long run on disk, one JSON line each: killed at any moment, at most one batch is lost.

The first line is the run's configuration. A run with another configuration never goes on with these results: it sets
them aside, under a name with their configuration's hash, where a run of theirs finds them again.
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
        header, lines = self._lines()
        if header is not None and header["config"] != config:
            self._set_aside(header["config"], config, bool(lines))
            header = None
        if header is None:
            header, lines = self._take_back(config)
        self.batches = {line["batch"]: line["results"] for line in lines}
        if header is None:
            self._write({"config": config})

    def _lines(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(first line, the others); the line that was being written at the moment of a kill has no end and goes."""
        self.stream.seek(0)
        content = self.stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.stream.truncate(len(whole))
        header, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        return header, lines

    def _aside(self, config: dict[str, Any]) -> Path:
        return self.path.with_name(f"{self.path.name}.{config_hash(config)[:8]}")

    def _set_aside(self, old: dict[str, Any], new: dict[str, Any], has_batches: bool) -> None:
        if has_batches:
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            kept = self._aside(old)
            self.stream.seek(0)
            kept.write_bytes(self.stream.read())
            print(f"{kept}: set aside, it is of a run with other {', '.join(changed)}", file=sys.stderr)
        self.stream.truncate(0)

    def _take_back(self, config: dict[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        kept = self._aside(config)
        if kept.exists():
            self.stream.write(kept.read_bytes())
            self.stream.flush()
            kept.unlink()
        return self._lines()

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
