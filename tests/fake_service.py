"""A small OpenAI-compatible service for the page's tests: it answers slowly, refuses, breaks off, notes what it saw.

with FakeService() as service: ... service.url, service.requests, service.closed
"""

import asyncio
import json
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

ENDLESS = 10_000


def error(status: int, message: str, code: str | None = None, **headers: str) -> JSONResponse:
    content = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
    return JSONResponse(content, status, headers)


class FakeService:
    """What the last question says decides the answer: see `answer`. `delay` is the time between two pieces."""

    def __init__(self, delay: float = 0.05) -> None:
        self.delay, self.requests, self.keys = delay, [], []
        self.closed: list[str] = []  # questions whose client left before the end
        self.queue_full, self.max_messages = False, 100

    def __enter__(self) -> "FakeService":
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def wait_until(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition(self):
            assert time.monotonic() < end, (self.requests[-1:], self.closed)
            time.sleep(0.02)

    async def models(self, request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "tiny-baichuan", "object": "model"}]})

    async def chat(self, request: Request):
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("authorization"))
        question = body["messages"][-1]["content"]
        if self.queue_full:
            return error(429, "the server is busy", "queue_full", **{"Retry-After": "7"})
        if len(body["messages"]) > self.max_messages:
            return error(400, "this model's context is 9 tokens", "context_length_exceeded")
        if question == "坏请求":
            return error(400, "temperature is wrong")
        return StreamingResponse(self.stream(question), media_type="text/event-stream")

    def pieces(self, question: str) -> list[str]:
        if "很长" in question:
            return ["词"] * ENDLESS
        return [f"第{len(self.requests)}次回答：", *question, "。"]

    async def stream(self, question: str):
        whole = False
        pieces = self.pieces(question)
        try:
            yield self.chunk({"role": "assistant", "content": ""})
            if "排队" in question:
                await asyncio.sleep(ENDLESS)
            for number, piece in enumerate(pieces):
                await asyncio.sleep(self.delay)
                if "出错" in question and number == 3:
                    yield f"data: {json.dumps({'error': {'message': 'the computation failed'}})}\n\ndata: [DONE]\n\n"
                    whole = True
                    return
                yield self.chunk({"content": piece})
            yield self.chunk({}, "stop")
            usage = {"prompt_tokens": 5, "completion_tokens": 321, "total_tokens": 326}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
            whole = True
        finally:
            if not whole:
                self.closed.append(question)

    @staticmethod
    def chunk(delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [choice], 'usage': None})}\n\n"
