"""Connections that misbehave (faults F08, F09, F20, F25 to F29), over real sockets and with shortened clocks."""

import gzip
import json
import os
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from llm_code.service.process import listen
from tests.raw_http import Raw
from tests.service_process import ServiceProcess, until

SETTINGS = {
    "max_body_bytes": 200_000,
    "receipt_seconds": 1.5,
    "keep_alive_seconds": 3.0,
    "stall_seconds": 1.5,
    "cors_origins": ["http://127.0.0.1:17860"],
}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    engine = {"step_seconds": 0.002, "context": 300_000, "max_batch": 16}
    process = ServiceProcess(tmp_path_factory.mktemp("service") / "log", SETTINGS, engine)
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.fixture
def connect(service):
    """Open raw connections that are closed after the test; afterwards the service is as before."""
    opened = []

    def open_one(**options):
        opened.append(Raw(service.port, **options))
        return opened[-1]

    yield open_one
    for raw in opened:
        raw.close()
    with closing(Raw(service.port)) as fresh:
        assert fresh.request().response()[0] == 200
        status, _, body = fresh.chat("say 好的").response()
        assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "好的"
    idle(service)


def metrics(service):
    with closing(Raw(service.port)) as raw:
        text = raw.request(path="/metrics").response()[2].decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def idle(service):
    """Wait until nothing runs or waits."""
    until(lambda: (seen := metrics(service))["llm_engine_running"] + seen["llm_engine_waiting"] == 0)


def error_of(body):
    assert set(json.loads(body)) == {"error"}
    return json.loads(body)["error"]


def head_of_post(*headers):
    return "\r\n".join(
        [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    ).encode()


def test_f08_body_too_large_by_its_length(connect):
    """Refused before a byte of it arrived."""
    raw = connect()
    status, _, body = raw.send(head_of_post("Content-Length: 1000000000")).response()
    assert status == 413 and "200000" in error_of(body)["message"]


def test_f08_body_too_large_in_chunks(connect):
    raw = connect().send(head_of_post("Transfer-Encoding: chunked"))
    chunk = b"%x\r\n" % 50_000 + b" " * 50_000 + b"\r\n"
    for _ in range(5):  # 250,000 bytes and no end
        raw.send(chunk)
    status, _, body = raw.response()
    assert status == 413 and error_of(body)["message"]


def test_f08_a_client_that_sends_it_all_can_read_the_refusal(connect):
    raw = connect().request("POST", CHAT, b" " * 3_000_000)
    assert raw.response()[0] == 413
    assert raw.request().response()[0] == 200  # and the connection is of further use


def test_f08_expect_100_continue_is_not_answered_by_continue(connect):
    raw = connect().send(head_of_post("Content-Length: 1000000000", "Expect: 100-continue"))
    assert raw.response()[0] == 413


def test_f08_gzip(connect):
    body = gzip.compress(b" " * 10_000_000)
    raw = connect().request("POST", CHAT, body, ["Content-Encoding: gzip"])
    status, _, reply = raw.response()
    assert status == 415 and "Content-Encoding" in error_of(reply)["message"]


@pytest.mark.parametrize(
    "request_bytes, statuses",
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 65_536 + b"\r\n\r\n", {400, 431}),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 1000 + b"\r\n", {431}),
        (b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {414}),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 414}),
        (b"GET /health HTTP/1.1\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", {400}),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
            {400},
        ),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", {400}),
    ],
)
def test_f09_headers(connect, request_bytes, statuses):
    raw = connect().send(request_bytes)
    status, headers, body = raw.response()
    assert status in statuses and error_of(body)["message"]
    assert headers["connection"] == "close" and raw.wait_closed() < 5


def test_f20_unknown_paths_and_wrong_methods(connect):
    raw = connect()
    for method, path, expected in [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("POST", CHAT + "/", 404),  # no redirect, which would lose the body
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/%ff%fe", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ]:
        status, headers, body = raw.request(method, path, b"{}" if method == "POST" else None).response()
        assert status == expected, path
        assert error_of(body)["message"] and "location" not in headers
        assert ("allow" in headers) == (status == 405)


def test_f20_head_and_options(connect):
    raw = connect()
    raw.request("HEAD", "/health")
    assert b" 200 " in raw.read_until(b"\r\n\r\n")
    for path, allowed in ((CHAT, "OPTIONS, POST"), ("/v1/models/a", "GET, HEAD, OPTIONS")):
        status, headers, _ = raw.request("OPTIONS", path).response()
        assert status == 204 and headers["allow"] == allowed
    assert raw.request("OPTIONS", "/nope").response()[0] == 404
    asked = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,x-stainless-os"]
    status, headers, _ = raw.request("OPTIONS", CHAT, None, ["Origin: http://127.0.0.1:17860", *asked]).response()
    assert status == 200 and headers["access-control-allow-origin"] == "http://127.0.0.1:17860"
    assert "authorization" in headers["access-control-allow-headers"]
    status, headers, _ = raw.request("OPTIONS", CHAT, None, ["Origin: http://evil.example", *asked]).response()
    assert "access-control-allow-origin" not in headers
    status, headers, _ = raw.request("GET", "/nope", None, ["Origin: http://127.0.0.1:17860"]).response()
    assert status == 404 and headers["access-control-allow-origin"]  # a page can read errors too


def test_without_a_key_only_this_machines_names_are_answered(connect):
    """A page of elsewhere whose name was pointed at 127.0.0.1 gets nothing."""
    raw = connect()
    for host, expected in [
        ("localhost", 200),
        ("127.0.0.1:10820", 200),
        ("[::1]:10820", 200),
        ("evil.example:10820", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.5", 403),
        ("", 403),
    ]:
        raw.send(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        status, _, body = raw.response()
        assert status == expected, host
        assert expected == 200 or error_of(body)["code"] == "unknown_host"
    raw.send(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert raw.response()[0] == 200


def test_f25_a_reader_that_stops_reading_is_dropped_and_others_go_on(service, connect):
    dropped = metrics(service).get('llm_rejected_total{reason="stalled_reader"}', 0)
    slow = connect(receive_buffer=2048)
    slow.chat("endless", stream=True, max_tokens=200_000, logprobs=True, top_logprobs=20)
    other = connect().chat("endless", stream=True, max_tokens=300)
    assert other.read_until(b"[DONE]").count(b'"content":"') > 290  # all of it, while nobody reads the other one
    until(lambda: metrics(service).get('llm_rejected_total{reason="stalled_reader"}', 0) > dropped)
    idle(service)
    assert slow.wait_closed() < 5


def test_f26_half_close_counts_as_gone(service, connect):
    """FIN of a client that left and of one that still reads look alike; the service says so and spins on neither."""
    raw = connect().chat("endless", stream=True, max_tokens=200_000)
    raw.read_until(b"data: ")
    raw.socket.shutdown(socket.SHUT_WR)
    assert raw.wait_closed() < 5
    idle(service)
    before = cpu_seconds(service)
    time.sleep(0.5)
    assert cpu_seconds(service) - before < 0.25


def cpu_seconds(service):
    fields = open(f"/proc/{service.process.pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_f27_reset_and_short_bodies(service, connect):
    log = service.log()
    connect().send(head_of_post("Content-Length: 5000") + b'{"messages":').reset()
    connect().send(head_of_post("Content-Length: 5000") + b'{"messages":').close()
    connect().send(head_of_post("Transfer-Encoding: chunked") + b"5\r\nab").reset()
    connect().send(b"POST /v1/comp").reset()
    until(lambda: metrics(service).get(f'llm_requests_total{{path="{CHAT}",status="499"}}', 0) >= 3)
    assert metrics(service)["llm_in_flight_requests"] == 1  # this look itself
    assert " 500 " not in service.log()[len(log) :]


def test_f28_slow_senders_are_cut_off_at_the_deadline(service, connect):
    """A header and a body that arrive byte by byte; a reply longer than the deadline goes on meanwhile."""

    def drip(raw, data):
        try:
            for place in range(len(data)):
                raw.send(data[place : place + 1])
                time.sleep(0.2)
        except OSError:
            pass
        return raw.wait_closed()

    stream = connect(timeout=20).chat("endless", stream=True, max_tokens=1000)
    with ThreadPoolExecutor() as threads:
        header = threads.submit(drip, connect(), b"GET /health HTTP/1.1\r\nHost: aaaaaaaaaaaaaaaaaaaaaa")
        body = threads.submit(drip, connect().send(head_of_post("Content-Length: 50")), b'{"messages": [' + b" " * 36)
        started = time.monotonic()
        assert header.result() < 5 and body.result() < 5
        assert time.monotonic() - started < 30 * 0.2  # long before all of it was sent
    assert metrics(service)['llm_rejected_total{reason="receipt_deadline"}'] >= 2
    assert stream.read_until(b"[DONE]").count(b'"content":"') > 990


def test_f28_pipelined_and_repeated_requests_keep_their_connection(connect):
    raw = connect()
    raw.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ready HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/mo")
    assert [raw.response()[0] for _ in range(2)] == [200, 200]
    raw.send(b"dels HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b'"list"' in raw.response()[2]
    time.sleep(1.8)  # longer than the receipt deadline, shorter than the keep-alive
    assert raw.request().response()[0] == 200
    raw.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")  # the beginning of a second one, and no more
    assert raw.response()[0] == 200
    assert raw.wait_closed() < 5


def test_f29_a_thousand_idle_connections(service, connect):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    idle_ones = [connect() for _ in range(1000)]
    files = f"/proc/{service.process.pid}/fd"
    until(lambda: len(os.listdir(files)) > 1000)
    status, _, body = connect().chat("say 在").response()
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "在"
    until(lambda: len(os.listdir(files)) < 50)  # closed by the keep-alive clock
    assert idle_ones[0].wait_closed() < 5 and idle_ones[-1].wait_closed() < 5


def test_small_replies_are_not_held_back():
    """asyncio turns Nagle's algorithm off only on sockets whose protocol is named."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
