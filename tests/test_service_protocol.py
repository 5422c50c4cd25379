"""OpenAI's protocol as its clients see it: openai-python, langchain-openai, curl, a reader of raw bytes."""

import asyncio
import json
import shutil
import subprocess
from contextlib import closing

import httpx
import openai
import pytest
from pydantic import TypeAdapter

from llm_code.module_interface.interface import Token
from llm_code.service import replies
from llm_code.service.app import create_app
from llm_code.service.logprobs import text_logprobs
from llm_code.service.settings import ServiceSettings
from tests.fake_engine import FakeEngine
from tests.raw_http import Raw
from tests.service_process import ServiceProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    settings = {"api_keys": [KEY], "model_aliases": ["team/alias"], "comment_seconds": 0.2}
    process = ServiceProcess(tmp_path_factory.mktemp("service") / "log", settings, {"step_seconds": 0.002})
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log()  # also after requests whose computation failed


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def events(response):
    """The JSON of a stream's events; checks the framing."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    *blocks, done, end = response.text.split("\n\n")
    assert done == "data: [DONE]" and end == ""
    blocks = [block for block in blocks if block != ": keep-alive"]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_openai_chat(client):
    answer = client.chat.completions.create(model="fake", messages=user("say 你好，世界"))
    assert answer.choices[0].message.content == "你好，世界" and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == 9 and answer.usage.completion_tokens == 5 and answer.usage.total_tokens == 14
    assert answer.id.startswith("chatcmpl-") and answer.model == "fake" and answer.system_fingerprint


def test_openai_chat_stream(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="team/alias", messages=user("say 你好"), stream=True, stream_options=options
    )
    *chunks, usage = list(stream)
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {(usage.id, usage.created, "team/alias")}
    assert all(chunk.usage is None for chunk in chunks)
    assert usage.choices == [] and usage.usage.completion_tokens == 2
    first, *middle, last = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert [chunk.choices[0].delta.content for chunk in middle] == ["你", "好"]
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].finish_reason is None for chunk in middle)
    assert last.choices[0].delta.content is None and last.choices[0].finish_reason == "stop"


def test_openai_several_choices(client):
    answer = client.chat.completions.create(model="fake", messages=user("say abc"), n=3, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"ab"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.prompt_tokens == 7 and answer.usage.completion_tokens == 6
    seen = {index: [] for index in range(3)}
    for chunk in client.chat.completions.create(model="fake", messages=user("say abc"), n=3, stream=True):
        seen[chunk.choices[0].index].append(chunk.choices[0])
    for choices in seen.values():
        assert [choice.delta.role for choice in choices] == ["assistant", None, None, None, None]
        assert "".join(choice.delta.content or "" for choice in choices) == "abc"
        assert [choice.finish_reason for choice in choices] == [None] * 4 + ["stop"]


def test_openai_logprobs(client):
    answer = client.chat.completions.create(model="fake", messages=user("say 你a"), logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content == "你a"
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "你a"
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    bare = client.chat.completions.create(model="fake", messages=user("say 你a"), logprobs=True)
    assert [token.top_logprobs for token in bare.choices[0].logprobs.content] == [[], []]
    stream = client.chat.completions.create(model="fake", messages=user("say 你a"), logprobs=True, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [part.content[0].token for part in parts if part] == ["你", "a"]


def test_openai_errors(client, service):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=user("x"))
    assert caught.value.code == "model_not_found" and caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=user("x"), temperature=5, stream=True)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="fake", messages=user("fail 1"))
    with pytest.raises(openai.APIError, match="computation"):
        list(client.chat.completions.create(model="fake", messages=user("fail 1"), stream=True))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    request_id = client.chat.completions.with_raw_response.create(
        model="fake", messages=user("say x"), extra_headers={"X-Request-Id": "mine-1"}
    )
    assert request_id.headers["x-request-id"] == "mine-1"


def test_openai_completions(client):
    answer = client.completions.create(model="fake", prompt=["say ab", "say cd"], n=2, max_tokens=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    assert answer.object == "text_completion" and answer.usage.prompt_tokens == 12
    assert answer.usage.completion_tokens == 8
    ids = client.completions.create(model="fake", prompt=list(map(ord, "say 好")), echo=True, logprobs=1)
    choice, prompt = ids.choices[0], "say 好"
    assert choice.text == prompt + "好" and choice.logprobs.tokens == list(prompt + "好")
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * 5] and choice.logprobs.text_offset == list(range(6))
    assert choice.logprobs.top_logprobs == [None, *({letter: -0.5} for letter in prompt[1:] + "好")]
    scored = client.completions.create(model="fake", prompt="say 好", echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].text == prompt and scored.choices[0].logprobs.tokens == list(prompt)
    both = client.completions.create(model="fake", prompt=[[97], [98]])
    assert [choice.text for choice in both.choices] == ["a", "b"]
    stream = client.completions.create(model="fake", prompt="say ab", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == "say abab"
    assert client.completions.create(model="fake", prompt="endless").usage.completion_tokens == 16  # OpenAI's default


def test_openai_models(client, service):
    assert [model.id for model in client.models.list()] == ["fake", "team/alias"]
    card = service.http.get("/v1/models/team/alias").json()
    assert card["context_length"] == card["max_model_len"] == 4096 and card["object"] == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_langchain(service, monkeypatch):
    from langchain_openai import ChatOpenAI

    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.delenv(name, raising=False)
    model = ChatOpenAI(
        base_url=f"http://127.0.0.1:{service.port}/v1", api_key=KEY, model="fake", max_tokens=20, max_retries=0
    )
    answer = model.invoke([("system", "简短"), ("human", "say 你好")])
    assert answer.content == "你好" and answer.usage_metadata["output_tokens"] == 2
    assert "".join(chunk.content for chunk in model.stream("say 你好")) == "你好"
    assert model.bind(stop=["x"], seed=1, logprobs=True).invoke("say 好").content == "好"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(service):
    def curl(*arguments):
        command = ["curl", "-sS", "-N", "--noproxy", "*", "-H", f"Authorization: Bearer {KEY}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    address = f"http://127.0.0.1:{service.port}"
    body = json.dumps({"messages": user("say 你好"), "stream": True})
    text = curl("-H", "Content-Type: application/json", "-d", body, address + CHAT)
    assert text.endswith("data: [DONE]\n\n") and "你" in text
    assert "415" in curl("-d", body, "-w", "%{http_code}", address + CHAT)
    query = curl(
        "-G", "--data-urlencode", "query=say 好", "-d", "appid=1&apiType=ask&userId=2", address + "/internal/ask"
    )
    assert json.loads(query) == {"llm_result": "好"}
    assert "HTTP/1.1 200" in curl("-I", address + "/health")


def test_raw_bytes_of_a_stream(service):
    """Every chunk is a whole event with its blank line; then the body ends, and the connection goes on."""
    with closing(Raw(service.port)) as raw:
        body = {"messages": user("say 你😀"), "stream": True}
        raw.request("POST", CHAT, body, [f"Authorization: Bearer {KEY}"])
        head = raw.read_until(b"\r\n\r\n").lower()
        assert b"transfer-encoding: chunked" in head and b"text/event-stream" in head and b"content-length" not in head
        chunks = []
        while size := int(raw.read_until(b"\r\n"), 16):
            while len(raw.buffer) < size + 2:
                raw.buffer += raw.receive()
            chunks.append(raw.buffer[:size])
            raw.buffer = raw.buffer[size + 2 :]
        assert raw.read_until(b"\r\n") == b"\r\n"
        assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)
        assert chunks[-1] == b"data: [DONE]\n\n" and "😀".encode() in chunks[2]
        raw.request("GET", "/health")
        assert raw.response()[0] == 200


def test_stream_options(service):
    plain = events(service.chat("say ab", stream=True))
    assert all("usage" not in event for event in plain)
    with_usage = events(service.chat("say ab", stream=True, stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in with_usage[:-1])
    assert with_usage[-1]["choices"] == [] and with_usage[-1]["usage"]["total_tokens"] == 8
    adapter = TypeAdapter(replies.ChatCompletionChunk)
    for event in [*plain, *with_usage]:
        adapter.validate_python(event)


def test_a_silent_stream_gets_comments(service):
    text = service.chat("say a", stream=True).text
    assert ": keep-alive" not in text
    with service.http.stream("POST", CHAT, json={"messages": user("gap 500"), "stream": True}) as response:
        lines = list(response.iter_lines())
    assert ": keep-alive" in lines and lines[-2] == "data: [DONE]"
    assert not any(line.startswith(("id:", "retry:", "event:")) or line == "data:" for line in lines)


def test_ask(service):
    body = {
        "appid": "a",
        "userId": 1,
        "apiType": "ask",
        "sessionId": "s",
        "logId": "l",
        "query": "say 好",
        "query_type": 0,
    }
    assert service.http.post("/internal/ask", json=body).json() == {"llm_result": "好"}
    for wrong, param in [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": 5}, "query"),
        ({**body, "apiType": "x"}, "apiType"),
    ]:
        response = service.http.post("/internal/ask", json=wrong)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert service.http.get("/internal/ask").status_code == 400
    assert service.http.post("/internal/ask", json={"query": "fail 0"}).status_code == 500  # no apology with a 200
    assert service.http.get("/internal/ask", params={"query": "x" * 4090}).status_code == 200
    assert service.http.post("/internal/ask", json={"query": "x" * 5000}).status_code == 400


def test_ask_is_not_for_pages_of_other_sites():
    """An image's address is enough for a page to have its visitor's browser send a GET, whatever it may read."""
    asked = {"query": "say 好"}
    settings = ServiceSettings(cors_origins=("https://ours.example",))

    async def ask():
        app = create_app(FakeEngine, settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost/internal") as http,
        ):
            while app.state.lifecycle.state != "ready":
                await asyncio.sleep(0.01)
            for site, origin, status in [
                ("cross-site", None, 403),
                ("same-site", None, 403),
                ("cross-site", "https://evil.example", 403),
                ("cross-site", "https://ours.example", 200),
                ("same-origin", None, 200),
                ("none", None, 200),  # typed into the address bar
            ]:
                headers = {"Sec-Fetch-Site": site, **({"Origin": origin} if origin else {})}
                for method in ("GET", "HEAD"):
                    reply = await http.request(method, "/ask", params=asked, headers=headers)
                    assert reply.status_code == status, (method, site, origin)
                # that a page of elsewhere cannot send JSON unasked is CORS' matter
                assert (await http.post("/ask", json=asked, headers=headers)).status_code == 200
            refused = await http.get("/ask", params=asked, headers={"Sec-Fetch-Site": "cross-site"})
            assert refused.json()["error"]["code"] == "other_site"

    asyncio.run(ask())


def test_openapi_describes_what_is_sent(service):
    """Real replies fit the schemas of the document; every route is in it."""
    document = service.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1") and json.dumps(document).count("$ref") > 20
    names = set(document["components"]["schemas"])
    for reference in set(json.dumps(document).split('"$ref": "')[1:]):
        assert reference.split('"')[0].removeprefix("#/components/schemas/") in names
    chat = document["paths"][CHAT]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("ChatCompletionRequest")
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "stop", "seed", "logit_bias", "top_logprobs", "stream_options"} <= set(fields)
    from llm_code.service.routes import ROUTES

    assert {route.path.replace(":path", "") for route in ROUTES} == set(document["paths"])
    for kind, response in [
        (replies.ChatCompletion, service.chat("say a", logprobs=True)),
        (replies.Completion, service.http.post(TEXT, json={"prompt": "say a", "logprobs": 1})),
        (replies.ModelList, service.http.get("/v1/models")),
        (replies.Health, service.http.get("/ready")),
        (replies.ErrorReply, service.http.get("/nope")),
    ]:
        TypeAdapter(kind).validate_json(response.content, strict=True)


def test_scores_from_an_upstream_server_that_tells_no_ids():
    """The half of a character and the text it completes are one token: it keeps the name it has among the likeliest."""
    token = Token(-1, "你", -0.5, ((-1, -0.5), (-1, -2.0)), ("bytes:\\xa0", "好"))
    scores = text_logprobs(FakeEngine(), [Token(-1, ""), token, Token(-1, "a", -3.0)], offset=0)
    assert scores.tokens == ["", "bytes:\\xa0", "a"] and scores.token_logprobs == [None, -0.5, -3.0]
    assert scores.top_logprobs == [None, {"bytes:\\xa0": -0.5, "好": -2.0}, {"a": -3.0}]
    assert scores.text_offset == [0, 0, 1]
