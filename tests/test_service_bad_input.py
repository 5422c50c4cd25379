"""Input no honest client sends (faults F01 to F07, F10 to F19): refused in OpenAI's error shape, nothing harmed."""

import asyncio
import json

import httpx
import pytest

from finetune.errors import UserError
from llm_code.service import strict_json
from llm_code.service.app import create_app
from llm_code.service.protocol import ChatCompletionRequest, validated
from llm_code.service.settings import ServiceSettings, check_address
from tests.fake_engine import FakeEngine
from tests.service_process import ServiceProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "say 好"}]
KEYS = ["first-key-of-two", "second-key-of-two"]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    process = ServiceProcess(
        tmp_path_factory.mktemp("service") / "log", {"api_keys": KEYS}, {"step_seconds": 0.001, "context": 200}
    )
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def bare(service):
    """A client without a key."""
    with httpx.Client(base_url=service.http.base_url, trust_env=False, verify=False) as client:
        yield client


@pytest.fixture(autouse=True)
def unharmed(request):
    """After every case: alive, and a control request answers as before."""
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        assert service.http.get("/health").status_code == 200
        assert service.chat("say 好的").json()["choices"][0]["message"]["content"] == "好的"


def assert_error(response, status, param=None, code=None):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert len(response.content) < 2000
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code


def post_raw(service, body, path=CHAT, **headers):
    return service.http.post(path, content=body, headers={"Content-Type": "application/json", **headers})


@pytest.mark.parametrize("body", [b"", b" ", b"{", b"[]", b'"x"', b"null", b"1", b"not json", b'{"a":1}x', b"\x00"])
def test_f01_no_json_object(service, body):
    assert_error(post_raw(service, body), 400)


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3\x28", b"\xed\xa0\xbd", b"\xf0\x9f"])
def test_f02_invalid_utf8(service, bad):
    assert_error(post_raw(service, b'{"messages":[{"role":"user","content":"' + bad + b'"}]}'), 400)


@pytest.mark.parametrize(
    "text", ["\x00", "\ufeff", "\u202eabc\u202c", "😀👩‍👩‍👧", "\ufffe\uffff", "e\u0301\u0301" * 20, "\r\n\t\x1b[31m"]
)
def test_f03_odd_characters_come_back_whole(service, text):
    response = service.chat(f"say {text}", stream=False)
    assert response.status_code == 200
    assert response.content.decode("utf-8") and response.json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("escape", [rb"\ud83d", rb"\ude00", rb"a\ud83dx", rb"\uDE00\uD83D"])
def test_f03_half_a_surrogate_pair(service, escape):
    assert_error(post_raw(service, b'{"messages":[{"role":"user","content":"' + escape + b'"}]}'), 400)
    assert_error(post_raw(service, b'{"' + escape + b'":1,"messages":[]}'), 400)


def test_f03_a_whole_pair_and_a_leading_byte_order_mark(service):
    body = rb'{"messages":[{"role":"user","content":"say \ud83d\ude00"}]}'
    assert post_raw(service, b"\xef\xbb\xbf" + body).json()["choices"][0]["message"]["content"] == "😀"


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_f04_numbers_json_does_not_have(service, literal):
    for field in ("temperature", "top_p", "unknown_field"):
        assert_error(post_raw(service, f'{{"messages":[{json.dumps(USER[0])}],"{field}":{literal}}}'.encode()), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b"{" + b",".join(b'"%d":1' % number for number in range(100_000)) + b"}",
        b'{"messages":[],"messages":[]}',
        b'{"messages":[{"role":"user","role":"system","content":"x"}]}',
    ],
)
def test_f05_depth_and_keys(service, body):
    assert_error(post_raw(service, body), 400)


def test_f05_deep_json_that_fits_the_parser():
    """Python versions differ in the depth they parse; what follows must not trip over any of it."""
    for depth in (10, 500, 900, 990, 5_000):
        text = '{"a":"\\u00e9","b":' + "[" * depth + "]" * depth + "}"
        try:
            assert "b" in strict_json.parse(text.encode())
        except strict_json.JsonError as error:
            assert "deep" in str(error)


@pytest.mark.parametrize("field", ["seed", "max_tokens", "temperature", "n", "anything"])
def test_f06_integers_of_5000_digits(service, field):
    body = f'{{"messages":[{json.dumps(USER[0])}],"{field}":{"9" * 5000}}}'
    assert_error(post_raw(service, body.encode()), 400)
    assert_error(post_raw(service, body.replace(":9", ":-9").encode()), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_f07_content_type(service, kind):
    body = json.dumps({"messages": USER}).encode()
    assert_error(service.http.post(CHAT, content=body, headers={"Content-Type": kind}), 415)
    request = service.http.build_request("POST", CHAT, content=body)
    assert "content-type" not in request.headers
    assert_error(service.http.send(request), 415)
    accepted = service.http.post(CHAT, content=body, headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert accepted.status_code == 200


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
MESSAGES = [
    (None, "messages"),
    ([], "messages"),
    ("hello", "messages"),
    ({}, "messages"),
    ([1], "messages[0]"),
    ([None], "messages[0]"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "robot", "content": "x"}], "messages[0].role"),
    ([{"role": 1, "content": "x"}], "messages[0].role"),
    ([{"role": "user", "content": 1}], "messages[0].content"),
    ([{"role": "user"}], "messages[0].content"),
    ([*USER, {"role": "user", "content": None}], "messages[1].content"),
    ([{"role": "user", "content": [IMAGE]}], "messages[0].content"),
    ([{"role": "user", "content": [1]}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    ([{"role": "tool", "content": "x"}], "messages"),
]


@pytest.mark.parametrize("messages, param", MESSAGES)
def test_f10_messages(service, messages, param):
    for stream in (False, True):
        response = service.http.post(CHAT, json={"messages": messages, "stream": stream})
        assert_error(response, 400, param)
    assert_error(service.http.post(CHAT, json={}), 400, "messages")


NUMBERS = {
    "temperature": [-1, 3, "hot", True, [], {}],
    "top_p": [0, 1.5, -0.1, "x"],
    "max_tokens": [0, -5, 1e12, 10**12, "x", True, 1.5],
    "max_completion_tokens": [0, -5, 10**12, "x", True],
    "n": [0, 10**8, 9, -1, "2", 1.5],
    "frequency_penalty": [9, -9, "x"],
    "presence_penalty": [9, -9, True],
    "repetition_penalty": [0, -1, 99],
    "top_k": [-2, 1.5],
    "min_tokens": [-1, "x"],
    "seed": [2**70, -(2**70), 1.5, "x", True],  # F13
    "stop": ["", ["a"] * 5, "x" * 10_240, [1], [""], 5, {}],  # F12
    "top_logprobs": [1, 0],  # F14: without logprobs
    "logit_bias": [{"a": 1}, {"1114112": 1}, {"1": "x"}, {"1": 1e9}, {"-1": 1}, {"1.5": 1}, [], {"1": True}],  # F15
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, 5],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "text"],
    "continue_final_message": [True],
}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in NUMBERS.items() for value in values])
def test_f11_to_f15_fields_out_of_range(service, field, value):
    response = service.http.post(CHAT, json={"messages": USER, field: value})
    param = response.json()["error"]["param"]
    assert_error(response, 400)
    assert param.split(".")[0].split("[")[0] in (field, "max_tokens")  # more tokens than the context: max_tokens


@pytest.mark.parametrize("value", [21, -1, "x", 1.5])
def test_f14_top_logprobs(service, value):
    response = service.http.post(CHAT, json={"messages": USER, "logprobs": True, "top_logprobs": value})
    assert_error(response, 400, "top_logprobs")


def test_f11_memory_does_not_grow(service):
    memory = f"/proc/{service.process.pid}/statm"
    for _ in range(2):  # the first round warms caches up
        before = int(open(memory).read().split()[1])
        for _ in range(100):
            service.http.post(CHAT, json={"messages": USER, "n": 10**8, "max_tokens": 10**12, "stop": ["x"] * 1000})
    assert int(open(memory).read().split()[1]) < 1.02 * before


PROMPTS = [None, [], "", [[]], [[], "a"], [1.5], [-1], [True], [0x110000], [[1], "a", 2], {}, 5, ["a"] * 300]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_of_completions(service, prompt):
    assert_error(service.http.post(TEXT, json={"prompt": prompt, "max_tokens": 1}), 400, "prompt")


def test_fields_of_completions(service):
    for field, value in [("logprobs", 21), ("logprobs", -1), ("suffix", "x"), ("best_of", 3), ("max_tokens", 0)]:
        assert_error(service.http.post(TEXT, json={"prompt": "a", field: value}), 400, field)


def test_f16_more_than_the_context(service):
    long = service.chat("x" * 250, max_tokens=1)
    assert_error(long, 400, "messages", "context_length_exceeded")
    for prompt in ("x" * 250, [65] * 250, "x" * 5000):
        response = service.http.post(TEXT, json={"prompt": prompt, "max_tokens": 1})
        assert_error(response, 400, "prompt", "context_length_exceeded")
    assert "200" in long.json()["error"]["message"] and "250" in long.json()["error"]["message"]
    both = service.http.post(TEXT, json={"prompt": [65] * 150, "max_tokens": 51})
    assert_error(both, 400, "max_tokens", "context_length_exceeded")
    assert "200" in both.json()["error"]["message"] and "201" in both.json()["error"]["message"]
    for stream in (True, False):  # refused before the first byte of a stream
        assert_error(service.chat("x" * 100, max_tokens=101, stream=stream), 400, code="context_length_exceeded")


def test_f16_twenty_megabytes_are_refused_before_they_are_encoded():
    engines = []

    async def ask():
        settings = ServiceSettings(max_body_bytes=32 << 20)
        app = create_app(lambda: engines.append(FakeEngine(context=4096)) or engines[0], settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            while app.state.lifecycle.state != "ready":
                await asyncio.sleep(0.01)
            body = {"messages": [{"role": "user", "content": "x" * (20 << 20)}]}
            return await http.post(CHAT, json=body), await http.post(TEXT, json={"prompt": "x" * (20 << 20)})

    for response in asyncio.run(ask()):
        assert_error(response, 400, code="context_length_exceeded")
    assert engines[0].encoded <= 2 * 4096 * 8


def test_f17_a_prompt_of_context_minus_one(service):
    response = service.http.post(TEXT, json={"prompt": [65] * 199, "max_tokens": 1})
    assert response.status_code == 200 and response.json()["choices"][0]["finish_reason"] == "length"
    unlimited = service.http.post(TEXT, json={"prompt": [65] * 199, "max_tokens": None})
    assert unlimited.json()["usage"]["completion_tokens"] == 1


def test_f18_models(service):
    for name in ("gpt-4o", "", "fake ", "FAKE", "a/b", "x" * 5000):
        assert_error(service.http.post(CHAT, json={"messages": USER, "model": name}), 404, "model", "model_not_found")
    assert_error(service.http.post(CHAT, json={"messages": USER, "model": 5}), 400, "model")
    for name in (None, "fake"):
        assert service.http.post(CHAT, json={"messages": USER, "model": name}).json()["model"] == "fake"


WRONG = [
    {},
    {"Authorization": "Bearer wrong-key-for-sure"},
    {"Authorization": f"Bearer {KEYS[0].upper()}"},
    {"Authorization": f"Bearer {KEYS[0]}x"},
    {"Authorization": f"Basic {KEYS[0]}"},
    {"Authorization": KEYS[0]},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer 密钥".encode()},
    [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", "Bearer wrong")],
    [("Authorization", f"Bearer {KEYS[0]}"), ("X-Api-Key", KEYS[1])],
    {"X-Api-Key": "wrong-key-for-sure"},
    {"X-Api-Key": f"{KEYS[0]},{KEYS[1]}"},
]


@pytest.mark.parametrize("headers", WRONG)
def test_f19_keys(service, bare, headers):
    for path in ("/v1/models", "/metrics", "/nope"):
        response = bare.get(path, headers=headers)
        assert_error(response, 401, code="invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_f19_right_keys_and_open_paths(service, bare):
    for headers in (
        {"Authorization": f"Bearer {KEYS[1]}"},
        {"authorization": f"bearer {KEYS[0]}"},
        {"X-Api-Key": KEYS[1]},
    ):
        assert bare.get("/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/ready"):
        assert bare.get(path).status_code == 200
    assert not any(key in service.log() for key in [*KEYS, "wrong-key-for-sure", "密钥"])


def test_f41_addresses_and_keys_of_the_settings():
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com", ""):
        with pytest.raises(UserError, match="API_KEY"):
            check_address(ServiceSettings(host=host))
        check_address(ServiceSettings(host=host, api_keys=("long-enough",)))
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_address(ServiceSettings(host=host))
    for wrong in (ServiceSettings(port=70_000), ServiceSettings(port=-1), ServiceSettings(api_keys=("short",))):
        with pytest.raises(UserError):
            check_address(wrong)


def test_accepted_and_ignored_fields(service):
    """What clients send with every request, and fields nobody knows."""
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "tools": [],
        "top_k": -1,
        "logprobs": None,
        "made_up": [1, 2],
        "stop": None,
        "logit_bias": None,
    }
    response = service.http.post(CHAT, json={"messages": USER, **ignored})
    assert response.status_code == 200, response.text


def test_content_in_parts_and_the_newer_limit():
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "好"}]
    body = {"messages": [{"role": "developer", "content": parts}], "max_tokens": 5, "max_completion_tokens": 7}
    request = validated(ChatCompletionRequest, body)
    assert request.plain_messages() == [{"role": "system", "content": "say 好"}]
    assert request.answer_tokens() == 7
