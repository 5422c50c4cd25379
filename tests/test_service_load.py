"""Clients that leave, crowds and failing computations (faults F21 to F25, F30 to F36, F44 to F46), with the scripted
engine."""

import asyncio
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest

from llm_code.module_interface.interface import SamplingParams
from llm_code.service.answers import MAX_BUFFERED_EVENTS, Answers
from llm_code.service.errors import ApiError
from tests.fake_engine import FakeEngine
from tests.raw_http import Raw
from tests.service_process import ServiceProcess, until

CHAT = "/v1/chat/completions"
TWO_KEYS = ["key-of-the-flood", "key-of-the-other"]
BATCH, QUEUE = 4, 4


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a service; one for the same settings is shared. All must end well."""
    started = {}

    def start_one(settings=None, engine=None):
        key = json.dumps([settings, engine])
        if key not in started:
            engine = {
                "step_seconds": 0.005,
                "max_batch": BATCH,
                "max_queue": QUEUE,
                "context": 50_000,
                **(engine or {}),
            }
            started[key] = ServiceProcess(tmp_path_factory.mktemp("service") / "log", settings, engine)
        return started[key]

    yield start_one
    for process in started.values():
        assert process.stop() == 0


def idle(service):
    """Wait until the engine has nothing left, and look whether a request is answered as ever."""
    until(lambda: running(service) == 0 and service.metric("llm_engine_waiting") == 0)
    assert service.chat("say 好的").json()["choices"][0]["message"]["content"] == "好的"
    assert service.http.get("/health").status_code == 200


def running(service):
    return service.metric("llm_engine_running ")


def steps(service):
    return service.metric("llm_engine_steps_total")


def test_f21_a_stream_whose_client_leaves(start):
    service = start()
    cancelled = service.metric("llm_cancelled_total")
    raw = Raw(service.port).chat("endless", stream=True, max_tokens=40_000)
    for _ in range(5):
        raw.read_until(b"\n\n")
    assert running(service) == 1
    raw.close()
    until(lambda: running(service) == 0, 3)
    assert service.metric("llm_cancelled_total") == cancelled + 1
    assert service.metric('llm_engine_requests_total{reason="cancelled"}') >= 1
    idle(service)
    assert "Traceback" not in service.log()


def test_f21_every_choice_of_a_stream_ends_with_it(start):
    service = start()
    cancelled = service.metric("llm_cancelled_total")
    raw = Raw(service.port).chat("endless", stream=True, max_tokens=40_000, n=3)
    raw.read_until(b"\n\n")
    assert running(service) == 3
    raw.reset()
    until(lambda: running(service) == 0, 3)
    assert service.metric("llm_cancelled_total") == cancelled + 3
    idle(service)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/internal/ask"])
def test_f22_a_request_whose_client_leaves(start, path):
    service = start()
    cancelled, left = (
        service.metric("llm_cancelled_total"),
        service.metric(f'llm_requests_total{{path="{path}",status="499'),
    )
    bodies = {
        CHAT: {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 40_000},
        "/v1/completions": {"prompt": "endless", "max_tokens": 40_000},
        "/internal/ask": {"query": "endless"},
    }
    raw = Raw(service.port).request("POST", path, bodies[path])
    until(lambda: running(service) == 1)
    raw.close()
    until(lambda: running(service) == 0, 3)
    assert service.metric("llm_cancelled_total") == cancelled + 1
    assert service.metric(f'llm_requests_total{{path="{path}",status="499') == left + 1
    idle(service)


@pytest.mark.parametrize("stream", [False, True])
def test_f23_a_queued_request_whose_client_leaves_never_starts(start, stream):
    service = start()
    full = [Raw(service.port).chat("endless", stream=True, max_tokens=40_000) for _ in range(BATCH)]
    until(lambda: running(service) == BATCH)
    queued = Raw(service.port).chat("say never", stream=stream)
    until(lambda: service.metric("llm_engine_waiting") == 1)
    answered = service.metric("llm_answer_tokens_total")
    queued.close()
    until(lambda: service.metric("llm_engine_waiting") == 0)
    for raw in full:
        raw.close()
    until(lambda: running(service) == 0)
    assert service.metric("llm_answer_tokens_total") == answered
    idle(service)


def test_f23_a_client_that_leaves_during_prefill(start):
    service = start()
    raw = Raw(service.port).chat("prefill 100000", stream=True)
    until(lambda: running(service) == 1)
    raw.close()
    until(lambda: running(service) == 0, 3)
    idle(service)


def test_f24_two_hundred_impatient_clients(start):
    service = start(engine={"max_batch": 16, "max_queue": 200})

    async def all_of_them():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=0.5, limits=limits, trust_env=False, verify=False) as http:
            body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 10_000}
            posts = [http.post(f"http://127.0.0.1:{service.port}{CHAT}", json=body) for _ in range(200)]
            return await asyncio.gather(*posts, return_exceptions=True)

    outcomes = asyncio.run(all_of_them())
    assert all(isinstance(outcome, httpx.TransportError) for outcome in outcomes)
    started = time.monotonic()
    assert service.chat("say 好").status_code == 200
    assert time.monotonic() - started < 5
    idle(service)


def test_f25_what_is_kept_for_a_reader_is_bounded():
    """A reader that never comes back: its events are dropped beyond a number, and it is told so when it does."""
    ended = []

    async def read_late():
        engine = FakeEngine(step_seconds=0, context=30_000)
        jobs = [(list(map(ord, "endless")), SamplingParams(max_tokens=20_000))]
        answers = Answers(engine, jobs, 60, lambda: ended.append(True))
        answers.start()
        while not ended:
            await asyncio.sleep(0.01)
        kept = answers._queue.qsize()
        count = 0
        try:
            async for _ in answers.events():
                count += 1
        except ApiError as error:
            return kept, count, error.code
        finally:
            engine.close()

    assert asyncio.run(read_late()) == (MAX_BUFFERED_EVENTS + 1, MAX_BUFFERED_EVENTS, "slow_client")


def test_f30_a_burst_of_four_times_the_capacity(start):
    """Exactly what fits is accepted, the rest refused at once; what was accepted is finished."""
    service = start()
    address, capacity = f"http://127.0.0.1:{service.port}{CHAT}", BATCH + QUEUE

    def ask(_):
        body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 600}
        response = httpx.post(address, json=body, timeout=60, trust_env=False, verify=False)
        return response.status_code, response.headers.get("Retry-After"), response.json()

    with ThreadPoolExecutor(4 * capacity) as threads:
        results = list(threads.map(ask, range(4 * capacity)))
    accepted = [body for status, _, body in results if status == 200]
    refused = [(retry, body["error"]["code"]) for status, retry, body in results if status == 429]
    assert len(accepted) == capacity and refused == [("1", "queue_full")] * (3 * capacity)
    assert all(body["usage"]["completion_tokens"] == 600 for body in accepted)
    idle(service)


def test_f30_a_refusal_does_not_wait_for_the_engine(start):
    service = start()
    full = [Raw(service.port).chat("endless", stream=True, max_tokens=40_000) for _ in range(BATCH + QUEUE)]
    until(lambda: service.metric("llm_engine_waiting") == QUEUE)
    before = steps(service)
    with closing(Raw(service.port)) as raw:
        assert raw.chat("say x", stream=True).response()[0] == 429
    assert steps(service) - before < 200  # at 5 ms a step; what is refused has not waited for a place
    for raw in full:
        raw.close()
    idle(service)


def test_f30_choices_count_as_requests(start):
    service = start()
    assert service.chat("say x", n=BATCH + QUEUE).status_code == 200
    with closing(Raw(service.port)) as raw:
        raw.chat("endless", stream=True, max_tokens=40_000, n=2).read_until(b"\n\n")
        assert service.chat("say x", n=BATCH + QUEUE - 1).status_code == 429
    idle(service)
    too_many = service.http.post("/v1/completions", json={"prompt": ["say x"] * 9})
    assert too_many.status_code == 400 and "8 answers" in too_many.json()["error"]["message"]
    assert too_many.json()["error"]["param"] == "prompt"


def test_more_choices_than_the_whole_service_has_room_for(start):
    service = start(engine={"max_queue": 0})
    for reply in (service.chat("say x", n=5), service.http.post("/v1/completions", json={"prompt": "say x", "n": 5})):
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "n"


@pytest.mark.parametrize("stream", [False, True])
def test_f31_waiting_longer_than_the_queue_timeout(start, stream):
    service = start(engine={"queue_timeout": 0.3})
    full = [Raw(service.port).chat("endless", stream=True, max_tokens=40_000) for _ in range(BATCH)]
    until(lambda: running(service) == BATCH)
    response = service.chat("say never", stream=stream)
    assert response.status_code == 503 and response.json()["error"]["code"] == "queue_timeout"
    assert response.headers["Retry-After"] and running(service) == BATCH
    for raw in full:
        raw.close()
    idle(service)


def test_f32_the_time_limit_of_a_request(start):
    service = start({"request_seconds": 0.6})
    response = service.chat("endless", max_tokens=40_000)
    assert response.status_code == 504 and response.json()["error"]["code"] == "request_timeout"
    assert response.headers["x-should-retry"] == "false"
    stream = service.chat("endless", max_tokens=40_000, stream=True)
    assert stream.status_code == 200
    *_, last, done = [line for line in stream.text.splitlines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout" and done == "data: [DONE]"
    idle(service)


def test_f34_f36_a_request_that_fails_harms_no_other(start):
    """Out of memory and a bug in one request reach the service alike: as that request's failure."""
    service = start()
    with ThreadPoolExecutor() as threads:
        good = [threads.submit(service.chat, "endless", max_tokens=200) for _ in range(2)]
        failing = threads.submit(service.chat, "fail 20")
        stream = service.chat("fail 20", stream=True)
        failed = failing.result()
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "computation_failed"
    assert stream.status_code == 200 and stream.text.endswith("data: [DONE]\n\n")
    last = stream.text.split("\n\n")[-3]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "computation_failed"
    for text in (failed.text, stream.text):  # neither paths nor addresses
        assert "/secret" not in text and "0x7f" not in text
    assert "/secret/path" in service.log()  # the reason is in the log
    assert all(future.result().json()["usage"]["completion_tokens"] == 200 for future in good)
    idle(service)


@pytest.mark.parametrize("how", ["die", "stick"])
def test_f35_an_engine_that_ends(tmp_path, how):
    """All in flight get an error, /health turns red, and the process ends with a status that says so."""
    service = ServiceProcess(tmp_path / "log", {"linger_seconds": 1.5}, {"step_seconds": 0.005})
    with ThreadPoolExecutor() as threads:
        others = [threads.submit(service.chat, "endless", max_tokens=3000) for _ in range(2)]
        stream = Raw(service.port).chat("endless", stream=True, max_tokens=3000)
        stream.read_until(b"\n\n")
        responses = [threads.submit(service.chat, how), *others]
        assert {future.result().status_code for future in responses} == {503}
        assert b'"code":"engine_dead"' in stream.read_until(b"[DONE]")
    health = service.http.get("/health")
    assert health.status_code == 503 and health.json() == {"status": "failed"}
    assert service.http.get("/ready").status_code == 503 and service.chat("say x").status_code == 503
    assert service.process.wait(10) == 3
    service.http.close()


def test_f44_counts_equal_what_clients_saw(start):
    service = start({"drain_seconds": 59})  # one of its own, unseen by other tests
    for content, fields in [("say x", {}), ("say x", {"stream": True}), ("fail 1", {}), ("say x", {"n": 0})]:
        service.chat(content, **fields)
    service.http.get("/nope")
    service.http.post(CHAT, content=b"x")
    service.http.request("DELETE", CHAT)
    with closing(Raw(service.port)) as raw:
        raw.send(b"nonsense\r\n\r\n").response()
    seen = {("POST", 200): 2, ("POST", 500): 1, ("POST", 400): 1, ("POST", 415): 1, ("DELETE", 405): 1}
    for (_, status), count in seen.items():
        assert service.metric(f'llm_requests_total{{path="{CHAT}",status="{status}"}}') == count, status
    assert service.metric('llm_requests_total{path="other",status="404"}') == 1
    assert service.metric('llm_requests_total{path="other",status="400"}') == 1  # the parser's
    for gauge in ("llm_engine_running ", "llm_engine_waiting", "llm_engine_cache_blocks_used"):
        assert service.metric(gauge) == 0
    assert service.metric("llm_in_flight_requests") == 1
    assert service.metric("llm_prompt_tokens_total") == 10 and service.metric("llm_answer_tokens_total") == 2
    text = service.http.get("/metrics").text
    for name in {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}:
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        assert f"# HELP {family} " in text and f"# TYPE {family} " in text


def test_f45_ten_thousand_short_requests(start):
    """Memory, files and threads stay what they were after the first thousand."""
    service = start(engine={"step_seconds": 0.0002, "max_batch": 64, "max_queue": 64})
    body = json.dumps({"prompt": [65], "max_tokens": 1}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", ""])
    request, process = f"{head}\r\n".encode() + body, f"/proc/{service.process.pid}"

    def send(count):
        with closing(Raw(service.port, timeout=60)) as raw:
            for _ in range(count // 10):
                raw.send(request * 10)
                assert [raw.response()[0] for _ in range(10)] == [200] * 10

    def send_all(count):
        threads = [threading.Thread(target=send, args=(count // 8,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def figures():
        resident = int(open(f"{process}/statm").read().split()[1])
        return resident, len(os.listdir(f"{process}/fd")), len(os.listdir(f"{process}/task"))

    send_all(2000)
    before = figures()
    send_all(8000)
    assert service.metric('llm_requests_total{path="/v1/completions",status="200"}') == 10_000
    resident, files, tasks = figures()
    assert resident < 1.05 * before[0]
    assert files <= before[1] + 1 and tasks <= before[2] + 1


def test_f46_a_flood_of_one_key_leaves_room_for_the_other(start):
    service = start({"api_keys": TWO_KEYS})
    share = BATCH // 2  # by default, with several keys
    flood = [Raw(service.port) for _ in range(20)]
    for raw in flood:
        body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 40_000, "stream": True}
        raw.request("POST", CHAT, body, [f"Authorization: Bearer {TWO_KEYS[0]}"])
    statuses = [raw.read_until(b"\r\n").split()[1] for raw in flood]
    assert sorted(statuses) == [b"200"] * share + [b"429"] * (20 - share)
    other = {"Authorization": f"Bearer {TWO_KEYS[1]}"}
    for _ in range(5):  # never refused, never queued behind the flood
        message = {"messages": [{"role": "user", "content": "say hello"}]}
        response = httpx.post(
            f"http://127.0.0.1:{service.port}{CHAT}", json=message, headers=other, trust_env=False, verify=False
        )
        assert response.status_code == 200
        assert service.metric("llm_engine_waiting") == 0
    for raw in flood:
        raw.close()
    idle(service)
