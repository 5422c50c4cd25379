"""A hub on a loopback port: the parts of modelscope's and Hugging Face's HTTP interfaces that their clients use.

    with Hub() as hub:
        hub.add("qwen/Qwen-14B-Chat", "v1.0.8", folder)

Real sockets, Range requests and checksums; `cut_once` closes a connection early, `hold` keeps one waiting, `corrupt`
damages a file on its way.
"""

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = 5_000  # files from this size on are listed as LFS files are, with their sha256


class Hub:
    """The server and its knobs. `requests` lists (method, path, Range header) of every request so far."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Path]] = {}
        self.cut_once: dict[str, int] = {}  # file name -> bytes after which its next transfer is cut
        self.hold: dict[str, int] = {}  # file name -> bytes after which its next transfer hangs until the hub is left
        self.holding = threading.Event()  # set when a transfer hangs
        self.corrupt: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.status: int | None = None  # answer everything with this status
        self.left = threading.Event()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, model_id: str, revision: str, folder: Path) -> None:
        self.models.setdefault(model_id, {})[revision] = folder

    def transfers(self, name: str) -> list[str | None]:
        """Range headers of the GET requests for one file's content."""
        content = re.compile(rf"(FilePath=|/resolve/[^/]+/){re.escape(name)}(&|$)")
        return [span for method, path, span in self.requests if method == "GET" and content.search(path)]


def commit_of(model_id: str, revision: str) -> str:
    return hashlib.sha1(f"{model_id} {revision}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set on the subclass."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, urllib.parse.unquote(self.path), self.headers.get("Range")))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        path = urllib.parse.unquote(url.path)
        if self.hub.status:
            return self.send_json({"message": "turned off"}, self.hub.status)
        for pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                return answer(self, *match.groups(), query)
        self.send_json({"message": "no such path"}, 404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Keep the test's stderr clean."""

    def send_json(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def modelscope_files(self, model_id: str, query: dict[str, str]) -> None:
        folder = self.hub.models.get(model_id, {}).get(query["Revision"])
        if folder is None:
            return self.send_json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        files = [
            {"Path": path.name, "Name": path.name, "Type": "blob", "Size": path.stat().st_size, "Sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        ]
        self.send_json({"Code": 200, "Data": {"Files": files}, "Success": True})

    def modelscope_revisions(self, model_id: str, _query: dict[str, str]) -> None:
        if model_id not in self.hub.models:
            return self.send_json({"Code": 404, "Message": "not found", "Success": False}, 404)
        tags = [{"Revision": revision} for revision in self.hub.models[model_id]]
        self.send_json({"Code": 200, "Data": {"RevisionMap": {"Branches": [], "Tags": tags}}, "Success": True})

    def modelscope_content(self, model_id: str, query: dict[str, str]) -> None:
        self.send_file(self.hub.models[model_id][query["Revision"]] / query["FilePath"])

    def hf_folder(self, model_id: str, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a revision or commit; answers 404 itself when there is none."""
        if model_id not in self.hub.models:
            return self.send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        for name, folder in self.hub.models[model_id].items():
            commit = commit_of(model_id, name)
            if revision in (name, commit):
                return commit, folder
        return self.send_json({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")

    def hf_info(self, model_id: str, revision: str, _query: dict[str, str]) -> None:
        found = self.hf_folder(model_id, revision)
        if found:
            siblings = [{"rfilename": path.name} for path in found[1].iterdir()]
            self.send_json({"_id": "1", "id": model_id, "modelId": model_id, "sha": found[0], "siblings": siblings})

    def hf_tree(self, model_id: str, revision: str, _query: dict[str, str]) -> None:
        found = self.hf_folder(model_id, revision)
        if found:
            self.send_json([hf_entry(path) for path in sorted(found[1].iterdir())])

    def hf_refs(self, model_id: str, _query: dict[str, str]) -> None:
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit_of(model_id, name)}
            for name in self.hub.models.get(model_id, {})
        ]
        self.send_json({"branches": [], "tags": tags, "converts": []})

    def hf_content(self, model_id: str, revision: str, name: str, _query: dict[str, str]) -> None:
        found = self.hf_folder(model_id, revision)
        if found:
            path = found[1] / name
            etag = sha256(path) if path.stat().st_size >= LARGE else git_sha1(path)
            self.send_file(path, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})

    def send_file(self, path: Path, headers: dict[str, str] | None = None) -> None:
        data = path.read_bytes()
        if path.name in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        stop = int(match[2]) + 1 if match and match[2] else len(data)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(path.name, data[start:stop])

    def send_body(self, name: str, body: bytes) -> None:
        held = self.hub.hold.pop(name, None)
        limit = self.hub.cut_once.pop(name, held)
        self.wfile.write(body[:limit])
        self.wfile.flush()
        if held is not None:
            self.hub.holding.set()
            self.hub.left.wait()
        if limit is not None:
            self.close_connection = True


def hf_entry(path: Path) -> dict:
    size = path.stat().st_size
    entry = {"type": "file", "path": path.name, "size": size, "oid": git_sha1(path)}
    return entry | ({"lfs": {"oid": sha256(path), "size": size, "pointerSize": 134}} if size >= LARGE else {})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


MODEL = r"([^/]+/[^/]+)"
ROUTES = [
    (rf"/api/v1/models/{MODEL}/repo/files", Handler.modelscope_files),
    (rf"/api/v1/models/{MODEL}/revisions", Handler.modelscope_revisions),
    (rf"/api/v1/models/{MODEL}/repo", Handler.modelscope_content),
    (rf"/api/models/{MODEL}/revision/([^/]+)", Handler.hf_info),
    (rf"/api/models/{MODEL}/tree/([^/]+)", Handler.hf_tree),
    (rf"/api/models/{MODEL}/refs", Handler.hf_refs),
    (rf"/{MODEL}/resolve/([^/]+)/([^/]+)", Handler.hf_content),
    (rf"/api/v1/datasets/{MODEL}/repo/tree", Handler.modelscope_files),
    (rf"/api/v1/datasets/{MODEL}/repo", Handler.modelscope_content),
    (rf"/api/datasets/{MODEL}/revision/([^/]+)", Handler.hf_info),
    (rf"/api/datasets/{MODEL}/tree/([^/]+)", Handler.hf_tree),
    (rf"/api/datasets/{MODEL}/refs", Handler.hf_refs),
    (rf"/datasets/{MODEL}/resolve/([^/]+)/([^/]+)", Handler.hf_content),
]
