"""The two hubs a model or a data set can come from, behind one shape: list a revision's files, fetch some of them.

modelscope is read through its own snapshot_download (four files at a time, resumed by Range, sha256 checked), Hugging
Face through huggingface_hub's. MODELSCOPE_ENDPOINT and HF_ENDPOINT name a mirror, MODELSCOPE_API_TOKEN and HF_TOKEN a
token.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

UNREACHABLE = ("ConnectionError", "ConnectError", "TransportError", "Timeout", "TimeoutError", "MaxRetryError")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a revision: size in bytes, and the hub's checksum of the content or of the git blob, if any."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


class ModelScope:
    """modelscope.cn or what MODELSCOPE_ENDPOINT names."""

    name = "modelscope"
    token_key, endpoint_key, other = "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT", "huggingface"

    def __init__(self, repo_type: str = "model", source_key: str = "SOURCE") -> None:
        self.source_key = source_key  # of .env, by which this hub was chosen
        self.repo_type = repo_type  # or dataset

    @property
    def endpoint(self) -> str:
        return os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"

    def list_files(self, model_id: str, revision: str) -> list[RemoteFile]:
        """The files of a revision."""
        from modelscope_hub import HubApi

        files = HubApi(endpoint=self.endpoint).list_repo_files(model_id, self.repo_type, revision=revision)
        return [RemoteFile(file.path, file.size, file.sha256) for file in files if not file.is_dir]

    def revisions(self, model_id: str) -> list[str]:
        """Names of branches and tags."""
        from modelscope_hub import HubApi

        found = HubApi(endpoint=self.endpoint).list_repo_revisions(model_id, self.repo_type)
        return [name for entry in found if (name := entry.get("Revision") or entry.get("revision"))]

    def fetch(self, model_id: str, revision: str, paths: list[str], folder: Path) -> None:
        """Download the files into folder, going on where an earlier call stopped."""
        from modelscope.hub.snapshot_download import snapshot_download

        snapshot_download(
            model_id,
            repo_type=self.repo_type,
            revision=revision,
            local_dir=str(folder),
            allow_patterns=paths,
            endpoint=self.endpoint,
        )


class HuggingFace:
    """huggingface.co or what HF_ENDPOINT names."""

    name = "huggingface"
    token_key, endpoint_key, other = "HF_TOKEN", "HF_ENDPOINT", "modelscope"

    @property
    def endpoint(self) -> str:
        return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def __init__(self, repo_type: str = "model", source_key: str = "SOURCE") -> None:
        self.source_key = source_key  # of .env, by which this hub was chosen
        self.repo_type = repo_type  # or dataset
        if os.environ.get("HF_TOKEN") == "":
            del os.environ["HF_TOKEN"]
        if os.environ.get("HF_ENDPOINT"):
            os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # mirrors don't carry the xet protocol

    def list_files(self, model_id: str, revision: str) -> list[RemoteFile]:
        """The files of a revision."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        entries = HfApi(self.endpoint).list_repo_tree(
            model_id, recursive=True, revision=revision, repo_type=self.repo_type
        )
        return [
            RemoteFile(f.path, f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id)
            for f in entries
            if isinstance(f, RepoFile)
        ]

    def revisions(self, model_id: str) -> list[str]:
        """Names of branches and tags."""
        from huggingface_hub import HfApi

        refs = HfApi(self.endpoint).list_repo_refs(model_id, repo_type=self.repo_type)
        return [ref.name for ref in [*refs.branches, *refs.tags]]

    def fetch(self, model_id: str, revision: str, paths: list[str], folder: Path) -> None:
        """Download the files into folder, going on where an earlier call stopped."""
        from huggingface_hub import snapshot_download

        snapshot_download(
            model_id,
            repo_type=self.repo_type,
            revision=revision,
            local_dir=folder,
            allow_patterns=paths,
            endpoint=self.endpoint,
        )


HUBS = {hub.name: hub for hub in (ModelScope, HuggingFace)}
Hub = ModelScope | HuggingFace


@contextmanager
def explained(hub: Hub, model_id: str, revision: str) -> Iterator[None]:
    """Turn what the hubs' libraries raise for a person's trouble into UserError; leave bugs alone."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = explain(hub, model_id, revision, error)
        if text is None:
            raise
        raise UserError(text) from error


def explain(hub: Hub, model_id: str, revision: str, error: BaseException) -> str | None:
    """One line for a failed request: no disk, no right, no such thing, no connection; None for anything else."""
    causes = [error, *chain(error)]
    status = next((code for cause in causes if (code := status_of(cause))), None)
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return "the disk is full. Free some and run again: what is downloaded stays."
    if isinstance(error, PermissionError) and error.filename:
        return f"cannot write {error.filename}. Set BASE_MODEL_DIR to a folder you may write."
    if status in (401, 403):
        return (
            f"{hub.endpoint} refuses {model_id} (HTTP {status}): there is no such {hub.repo_type}, or it wants a "
            f"token. Check the {hub.repo_type} id, or set {hub.token_key}."
        )
    if status in (400, 404):
        return missing(hub, model_id, revision)
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if status or names.intersection(UNREACHABLE):
        reason = f"HTTP {status}" if status else headline(causes[-1])
        return (
            f"cannot reach {hub.endpoint}: {reason}. Check the network and run again (what is downloaded stays), "
            f"or set {hub.endpoint_key} to a mirror, or {hub.source_key}={hub.other}."
        )
    failed = getattr(error, "failed_files", None)
    if failed:
        file, cause = next(iter(failed.items()))
        return f"{len(failed)} files failed, first {file}: {headline(cause)}. Run again: what is complete stays."
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """The errors behind an error: of single files, and causes."""
    inner = list((getattr(error, "failed_files", None) or {}).values()) + [error.__cause__ or error.__context__]
    for cause in filter(None, inner):
        yield cause
        yield from chain(cause)


def status_of(error: BaseException) -> int | None:
    """HTTP status of an error of either library."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) or getattr(error, "status_code", None)


def headline(error: BaseException) -> str:
    """First line of an error's text, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def missing(hub: Hub, model_id: str, revision: str) -> str:
    """The line for HTTP 404: says which revisions there are if the model itself exists."""
    try:
        found = hub.revisions(model_id)
    except Exception:
        found = []
    if not found:
        kind = hub.repo_type
        return f"{hub.endpoint} has no {kind} {model_id}. Check the {kind} id, or set {hub.source_key}={hub.other}."
    return f"{model_id} has no revision {revision} on {hub.endpoint}: it has {', '.join(found[:12])}."
