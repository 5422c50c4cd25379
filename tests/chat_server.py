"""The smallest server of the OpenAI protocol: a loaded model behind /v1/models and /v1/chat/completions, greedy.

with ChatServer(model, tokenizer) as server: ... server.url
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from finetune.conversation import encode_prompt
from finetune.generate import generate_batch


class ChatServer:
    """`requests` are the bodies so far; the first `busy` chats are answered with 503, the others with `status`."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.busy, self.status, self.requests, self.keys = 0, 200, [], set()
        self.card = {}  # further fields of the model in /v1/models
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"chat": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            self.requests.append(body)
            if self.busy:
                self.busy -= 1
                return 503, {"error": {"message": "busy"}}
            if self.status != 200:
                return self.status, {"error": {"message": "turned off"}}
            prompt = encode_prompt(self.tokenizer, body["messages"])
            text = generate_batch(self.model, self.tokenizer, [prompt], body["max_tokens"])[0]
        return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `chat` is set on the subclass."""

    chat: ChatServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"} | self.chat.card]})

    def do_POST(self) -> None:
        self.chat.keys.add(self.headers.get("Authorization"))
        self.send(*self.chat.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "0.01")
        if status == 504:
            self.send_header("x-should-retry", "false")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's stderr clean."""


class ScriptedServer(ChatServer):
    """Answers as `reply(body)` says: (status, text of the answer or of the error)."""

    def __init__(self, reply):
        super().__init__(None, None)
        self.reply = reply

    def answer(self, body):
        with self.lock:
            self.requests.append(body)
        status, text = self.reply(body)
        return status, {"choices": [{"message": {"content": text}}]} if status == 200 else {"error": {"message": text}}
