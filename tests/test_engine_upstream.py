"""The engine in front of another server, against a server of a few lines that says exactly what the test wants."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune.errors import UserError
from llm_code.module_interface.interface import (
    ContextTooLong,
    EngineClosed,
    QueueFull,
    SamplingParams,
    UpstreamError,
)
from llm_code.module_interface.load import EngineSettings, load_engine


class Server:
    """Answers /v1/models, and /v1/completions with the lines of `script`; notes what it was asked and who left."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list = []
        self.script: list = []  # bytes to send, a number of seconds to wait
        self.status, self.extra_headers = 200, {}
        self.left = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.reply(self, b'{"object":"list","data":[{"id":"their/model","max_model_len":300}]}')

            def do_POST(self) -> None:
                server.headers.append(self.headers)
                server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                server.answer(self)

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reply(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        handler.send_response(self.status)
        for name, value in self.extra_headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.reply(handler, b"")
        try:
            for part in self.script:
                if isinstance(part, bytes):
                    handler.wfile.write(part)
                else:
                    time.sleep(part)
        except OSError:
            self.left.set()


def data(value) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str, finish: str | None = None, **others) -> bytes:
    return data({"choices": [{"index": 0, "text": text, "finish_reason": finish, **others}], "usage": None})


DONE = b"data: [DONE]\n\n"


def usage(count: int, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    return data({"choices": [], "usage": {"completion_tokens": count, "prompt_tokens_details": details}})


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def engine(server, tiny_qwen):
    settings = EngineSettings(str(tiny_qwen), "vllm", upstream_url=server.url, upstream_api_key="secret", max_queue=0)
    engine = load_engine(settings)
    yield engine
    engine.close()


def test_an_answer_streams_through(server, engine):
    server.script = [
        piece("你"),
        b": keep-alive\n\n",
        piece("好"),
        piece("", "stop", stop_reason="。"),
        usage(5, 3),
        DONE,
    ]
    messages = [{"role": "user", "content": "问"}]
    events = list(engine.stream(messages, SamplingParams(max_tokens=9, temperature=0)))
    assert [event.text for event in events] == ["你", "好", ""]
    assert (events[-1].finish_reason, events[-1].stop_reason, events[-1].num_tokens) == ("stop", "。", 5)
    assert events[-1].num_cached_tokens == 3
    assert server.bodies == [
        {
            "model": "their/model",
            "prompt": engine.encode_chat(messages),
            "max_tokens": 9,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert engine.limits.context == 300
    assert engine.stats().requests == {"stop": 1} and engine.stats().generated_tokens == 5


def test_line_separators_in_an_answer(server, engine):
    server.script = [piece("一\u2028二"), piece("\u2029\x85", "stop"), DONE]
    assert engine.submit([1], SamplingParams(max_tokens=9)).result(10).text == "一\u2028二\u2029\x85"


def test_every_parameter_is_passed_on(server, engine):
    server.script = [piece("", "length"), DONE]
    params = SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        seed=3,
        stop=("a", "b"),
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        logit_bias={5: -1.0},
        logprobs=2,
        min_tokens=1,
        ignore_eos=True,
    )
    assert engine.submit([1, 2], params).result(10).finish_reason == "length"
    passed = {key: value for key, value in server.bodies[0].items() if key not in ("model", "stream", "stream_options")}
    assert passed == {
        "prompt": [1, 2],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 3,
        "stop": ["a", "b"],
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": {"5": -1.0},
        "logprobs": 2,
        "min_tokens": 1,
        "ignore_eos": True,
    }


def test_logprobs_and_an_echoed_prompt(server, engine):
    scores = {
        "tokens": ["A", "B", "bytes:\\xe4\\xbd", "bytes:\\xa0"],
        "token_logprobs": [None, -1.0, -2.0, -3.0],
        "top_logprobs": [None, {"B": -1.0, "C": -1.5}, {"bytes:\\xe4\\xbd": -2.0}, {"bytes:\\xa0": -3.0}],
        "text_offset": [0, 1, 2, 2],
    }
    server.script = [piece("AB你", None, logprobs=scores), piece("", "length"), usage(2), DONE]
    completion = engine.submit([7, 8], SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1)).result(10)
    assert server.bodies[0]["echo"] is True
    assert [(t.text, t.logprob) for t in completion.prompt_tokens] == [("A", None), ("B", -1.0)]
    assert completion.prompt_tokens[1].alternative_texts == ("B", "C")
    assert [(t.text, t.logprob) for t in completion.tokens] == [("", -2.0), ("你", -3.0)]
    assert completion.text == "你" and completion.num_tokens == 2


def test_a_refusal_keeps_its_status_and_words(server, engine):
    server.status, server.extra_headers = 429, {"Retry-After": "7"}
    server.script = [b'{"error": {"message": "too many", "type": "x", "param": null, "code": null}}']
    with pytest.raises(UpstreamError, match=r"refused \(429\): too many") as caught:
        engine.submit([1], SamplingParams(max_tokens=1)).result(10)
    assert (caught.value.status, caught.value.retry_after) == (429, 7.0)
    server.status, server.extra_headers, server.script = 500, {}, [b"<html>no</html>"]
    with pytest.raises(UpstreamError, match=r"refused \(500\): <html>no"):
        engine.submit([1], SamplingParams(max_tokens=1)).result(10)
    assert engine.stats().requests == {"error": 2} and engine.stats().running == 0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([piece("a"), data({"error": {"message": "out of memory"}}), DONE], "broke off: out of memory"),
        ([piece("a")], "closed the connection"),
        ([piece("a"), DONE], "closed the connection"),
        ([b"data: {nonsense\n\n"], "not understood: JSONDecodeError"),
        ([b'data: {"choices": [7]}\n\n'], "not understood"),
    ],
)
def test_a_broken_stream_is_an_error(server, engine, script, message):
    server.script = script
    with pytest.raises(UpstreamError, match=message):
        engine.submit([1], SamplingParams(max_tokens=1)).result(10)
    server.script = [piece("fine", "stop"), DONE]
    assert engine.submit([1], SamplingParams(max_tokens=1)).result(10).text == "fine"


def test_cancelling_closes_the_connection(server, engine):
    server.script = [piece("x"), *[part for _ in range(500) for part in (piece("y"), 0.02)]]
    request = engine.submit([1], SamplingParams(max_tokens=100))
    iterator = iter(request)
    assert next(iterator).text == "x"
    request.cancel()
    assert list(iterator)[-1].finish_reason == "cancelled"
    assert server.left.wait(5)
    request.cancel()  # harmless
    assert engine.stats().running == 0


def test_a_request_cancelled_before_it_began_gets_its_last_event(server, engine):
    """Whoever left at once holds no place: the service counts places until the last event."""
    server.script = [0.2, piece("late", "stop"), DONE]
    requests = []
    for _ in range(100):
        requests.append(engine.submit([1], SamplingParams(max_tokens=1)))
        requests[-1].cancel()
    ends: list[str] = []
    reader = threading.Thread(target=lambda: ends.extend(list(one)[-1].finish_reason for one in requests), daemon=True)
    reader.start()
    reader.join(30)
    assert ends == ["cancelled"] * 100 and engine.stats().running == 0


def test_limits_hold_here_too(server, tiny_qwen):
    settings = EngineSettings(str(tiny_qwen), "vllm", upstream_url=server.url, max_batch=2, max_queue=1)
    engine = load_engine(settings)
    server.script = [0.5, piece("late", "stop"), DONE]
    requests = [engine.submit([1], SamplingParams(max_tokens=1)) for _ in range(3)]
    with pytest.raises(QueueFull):
        engine.submit([1], SamplingParams(max_tokens=1))
    with pytest.raises(ContextTooLong):
        engine.submit([1] * 299, SamplingParams(max_tokens=5))
    engine.close(drain_seconds=10)
    assert [request.result(1).text for request in requests] == ["late"] * 3
    with pytest.raises(EngineClosed):
        engine.submit([1], SamplingParams(max_tokens=1))


def test_a_server_that_goes_away(server, engine):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UpstreamError, match="does not answer"):
        engine.submit([1], SamplingParams(max_tokens=1)).result(10)


def test_nothing_at_the_address(tiny_qwen):
    with pytest.raises(UserError, match="found none.*UPSTREAM_URL"):
        load_engine(EngineSettings(str(tiny_qwen), "vllm", upstream_url="http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="needs UPSTREAM_URL"):
        load_engine(EngineSettings(str(tiny_qwen), "vllm"))
    with pytest.raises(UserError, match="local or vllm, found 'other'"):
        load_engine(EngineSettings(str(tiny_qwen), "other"))
