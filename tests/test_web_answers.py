"""What the page makes of the service's answers and of conversations, without a browser."""

import asyncio
import json
import time
from types import SimpleNamespace

import httpx
import pytest

from finetune.errors import UserError
from llm_code.web_framework import actions
from llm_code.web_framework.conversations import (
    as_json,
    as_markdown,
    plain,
    read_record,
    record_of,
    title_of,
    to_send,
    up_to_question,
)
from llm_code.web_framework.service import BrokenOff, Progress, Refused, Service, refusal

TALK = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(["甲", "一", "乙", "二"])]


def chunk(text=None, finish_reason=None):
    return {"choices": [{"delta": {"content": text} if text else {}, "finish_reason": finish_reason}], "usage": None}


def service_that_answers(body: bytes, status: int = 200, headers=None):
    """A Service over a transport that gives one answer."""

    def handle(request):
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(status, content=body, headers=headers)

    service = Service("http://127.0.0.1:1/v1")
    service._client = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    return service


def collect(stream):
    async def run():
        return [(progress.text, progress.num_tokens) async for progress in stream]

    return asyncio.run(run())


def sse(*events):
    texts = (e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in events)
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def test_a_stream_is_read_with_comments_usage_and_windows_line_ends():
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    body = b": keep-alive\n\n" + sse(chunk("你"), chunk("好"), chunk(finish_reason="stop"), usage, "[DONE]")
    seen = collect(service_that_answers(body.replace(b"\n", b"\r\n")).stream(TALK[:1], {}))
    assert seen[0] == ("你", 1) and seen[-1] == ("你好", 7)


def test_line_separators_in_an_answer():
    body = sse(chunk("一\u2028二"), chunk("\u2029\x85"), chunk(finish_reason="stop"), "[DONE]")
    assert collect(service_that_answers(body).stream(TALK[:1], {}))[-1][0] == "一\u2028二\u2029\x85"


@pytest.mark.parametrize(
    ("events", "kind", "words"),
    [
        ([chunk("你")], BrokenOff, "ended early"),
        ([], Refused, "ended early"),
        ([chunk("你"), {"error": {"message": "out of memory"}}], BrokenOff, "out of memory"),
        ([{"error": {"message": "out of memory"}}], Refused, "out of memory"),
        ([chunk("你"), "{broken"], BrokenOff, "no JSON"),
        ([chunk(finish_reason="stop"), "[DONE]"], Refused, "没有给出回答"),
    ],
)
def test_an_answer_that_does_not_end_well(events, kind, words):
    with pytest.raises(kind, match=words):
        collect(service_that_answers(sse(*events)).stream(TALK[:1], {}))


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (429, b'{"error": {"message": "busy", "code": "queue_full"}}', {"retry-after": "3"}, "排队已满.* 3 秒后"),
        (429, b"<html>", {}, "排队已满.*稍后"),
        (503, b"{}", {}, "还没有准备好"),
        (401, b'{"error": {"message": "no key"}}', {}, "API_KEY"),
        (400, b'{"error": {"message": "temperature: too hot"}}', {}, "400.*too hot"),
        (
            400,
            b'{"error": {"message": "4103 tokens", "code": "context_length_exceeded"}}',
            {},
            "请缩短问题.*4103 tokens",
        ),
        (500, b"\xff", {}, "500"),
        (502, b'{"error": "text"}', {}, "502"),
    ],
)
def test_refusals_in_plain_words(status, body, headers, words):
    error = refusal(status, httpx.Headers(headers), body)
    with pytest.raises(Refused, match=words):
        raise error


def test_no_service_is_told_with_what_to_start():
    with pytest.raises(Refused, match="make baichuan-serve"):
        asyncio.run(Service("http://127.0.0.1:9/v1").model())


def test_a_refused_question_goes_back_and_the_chat_is_as_before():
    from llm_code.web_framework.answering import answer  # here, since gradio takes seconds to import

    service = service_that_answers(b'{"error": {"message": "busy"}}', 429)
    chat = [*TALK, {"role": "user", "content": "丙"}]

    async def run(before):
        return [values async for values in answer(service, chat, before, "", True, 0.3, 0.85, 64)]

    messages, _, refused, text = asyncio.run(run((TALK, "丙")))[-1]
    assert messages == TALK and text == "丙" and "排队已满" in refused.value and refused.visible
    assert asyncio.run(run(None))[-1][0] == TALK, "also when the page's session was lost"


def test_an_emptied_question_changes_nothing():
    """The browser shows it empty already: the conversation comes back as it was, and nothing is asked."""
    edited = [*TALK[:2], {"role": "user", "content": " "}, TALK[3]]
    event = SimpleNamespace(index=2, value=" ", previous_value="乙")
    chat, *others = actions.edit(edited, "", "identity", event)
    assert chat == TALK and others == list(actions.send(" ", TALK, "", "identity")[1:])
    event.value = "改"
    assert actions.edit(edited, "", "identity", event)[0] == [*TALK[:2], {"role": "user", "content": "改"}]


def test_speed_counts_from_the_first_token():
    from llm_code.web_framework.answering import outcome  # here, since gradio takes seconds to import

    progress = Progress(started=time.monotonic())
    progress.num_tokens, progress.first, progress.elapsed = 11, 2.0, 4.0
    assert progress.speed == 5.0
    progress.finish_reason = "length"
    line = outcome(progress, 2)
    assert "11 个词元 · 5.0 词元/秒 · 首字 2.00 秒" in line and "最大长度" in line and "2 轮没有发送" in line


def test_sampling_is_the_models_own_unless_asked_for():
    from llm_code.web_framework.answering import chosen_sampling  # here, since gradio takes seconds to import

    assert chosen_sampling(True, 0.3, 0.9, 64.0) == {"max_tokens": 64}
    assert chosen_sampling(False, 0.3, 0.9, 64.0) == {"max_tokens": 64, "temperature": 0.3, "top_p": 0.9}


def test_contents_in_parts_become_text():
    parts = [{"role": "user", "content": [{"type": "text", "text": "甲"}, {"type": "text", "text": "乙"}]}]
    assert plain(parts) == [{"role": "user", "content": "甲乙"}] and plain(None) == []


@pytest.mark.parametrize(("index", "kept", "question"), [(3, TALK[:2], "乙"), (2, TALK[:2], "乙"), (1, [], "甲")])
def test_the_question_of_a_message(index, kept, question):
    assert up_to_question(TALK, index) == (kept, question)


def test_what_is_sent():
    assert to_send(TALK, " 你是医生 ", 1) == [{"role": "system", "content": "你是医生"}, *TALK[2:]]
    stopped = [TALK[0], {"role": "assistant", "content": ""}, TALK[2]]
    assert to_send(stopped, " ") == [TALK[0], TALK[2]]


def test_records_survive_the_browser_and_garbage_is_ignored():
    record = record_of("id1", TALK, None)
    assert record["title"] == "甲" and read_record(json.dumps(record)) == {"id": "id1", "system": "", "messages": TALK}
    for garbage in ("", None, "{", "[]", "3", '{"id": 1}', '{"id": 1, "system": "", "messages": [3]}'):
        assert read_record(garbage) is None
    assert title_of([{"role": "user", "content": "很" * 30}]) == "很" * 17 + "…" and title_of([]) == ""


def test_exports():
    assert as_markdown(TALK[:2], "你是医生").split("\n\n")[2:] == [
        "> 系统提示：你是医生",
        "**用户**",
        "甲",
        "**模型**",
        "一\n",
    ]
    exported = json.loads(as_json(TALK, "你是医生"))
    assert exported["messages"] == [{"role": "system", "content": "你是医生"}, *TALK] and exported["exported"]


def test_a_port_that_is_none_is_refused():
    from llm_code.web_framework.web_app import check_port

    with pytest.raises(UserError, match="port 70000 on 127.0.0.1 cannot be used .*0-65535"):
        check_port(70000)
