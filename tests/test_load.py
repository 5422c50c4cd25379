"""The load generator: its arrivals, its clock, its statistics; and a run of the CPU benchmark on a tiny model."""

import asyncio
import json
import math
import statistics
import subprocess
import sys

import httpx
import numpy
import pytest

from benchmarks import serve_gpu
from benchmarks.load import EngineTarget, HttpTarget, Job, arrivals, closed_loop, open_loop, words
from benchmarks.load_report import Record, draw, is_good, percentile, summary, table
from tests.conftest import REPOSITORY
from tests.engines import engine, prompts


class SlowServer:
    """Answers one request at a time, each after a fixed while; the third refuses."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.lock, self.running, self.most = seconds, asyncio.Lock(), 0, 0

    async def ask(self, job: Job, note) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with self.lock:
                await asyncio.sleep(self.seconds)
                if job.number == 2:
                    raise RuntimeError("status 429")
                note()
                return 5
        finally:
            self.running -= 1


def jobs(count: int) -> list[Job]:
    return [Job(i, 10, 5) for i in range(count)]


def test_arrivals_are_poisson():
    moments = arrivals(20000, rate=4.0, seed=1)
    gaps = [b - a for a, b in zip([0.0, *moments], moments, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)  # an exponential's deviation is its mean
    assert moments == sorted(moments) == arrivals(20000, 4.0, 1) != arrivals(20000, 4.0, 2)


def test_an_open_loop_counts_from_the_moment_a_request_was_due():
    """Ten requests at once to a server that needs 20 ms for each: the last one waited for all, and this is told."""
    records = asyncio.run(open_loop(SlowServer(0.02), jobs(10), [0.01] * 10))
    waits = sorted(record.end - record.due for record in records)
    assert waits[-1] >= 10 * 0.02 and waits[0] < waits[-1] / 3
    assert [record.error for record in records].count("RuntimeError: status 429") == 1


def test_a_closed_loop_keeps_so_many_clients_busy():
    server = SlowServer(0.005)
    records = asyncio.run(closed_loop(server, jobs(12), 4))
    assert server.most == 4 and len(records) == 12
    result = summary(records, 1.0, 1.0)
    assert (result["requests"], result["failed"]) == (12, 1)
    assert result["tokens_per_second"] == pytest.approx(55 / result["seconds"])
    assert "error: RuntimeError: status 429" in table(result, records, 1.0, 1.0)


def test_percentiles_are_numpys():
    values = [5.0, 1.0, 9.0, 2.0, 2.5]
    for percent in (0, 10, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))
    assert math.isnan(percentile([], 50))


def test_goodput_is_a_promise_kept():
    record = Record(due=1.0, moments=[1.5, 1.6, 1.9], end=2.0, num_tokens=3)
    assert record.first_token == 0.5 and record.gaps == pytest.approx([0.1, 0.3])
    assert is_good(record, 0.5, 0.21)
    assert not is_good(record, 0.4, 0.21)
    assert not is_good(record, 0.5, 0.19)
    assert not is_good(Record(due=0, error="x"), 9, 9)
    assert not is_good(Record(due=0), 9, 9)


def test_prompts_differ():
    assert len({words(job) for job in jobs(50)}) == 50


def test_the_engine_under_load_and_its_picture(tmp_path):
    running = engine(max_queue=50)
    records = asyncio.run(closed_loop(EngineTarget(running, prompts(5, 20, 9)), jobs(10), 6))
    running.close()
    assert [record.num_tokens for record in records] == [5] * 10
    assert all(len(record.moments) == 5 and not record.error for record in records)
    draw(records, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_no_server_is_told_in_one_line():
    command = [sys.executable, "-m", "benchmarks.load", "--url", "http://127.0.0.1:9/v1"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: expected an OpenAI server at http://127.0.0.1:9/v1")


def test_the_cpu_benchmark_runs(tiny_qwen, capsys, monkeypatch):
    from benchmarks import bench_serve

    arguments = ["bench_serve", "--model_name_or_path", str(tiny_qwen), "--rounds", "1", "--new_tokens", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert bench_serve.main() in (0, 1)  # the figures of a tiny model mean nothing
    printed = capsys.readouterr().out
    assert printed.count("cost: ") == len(bench_serve.BARS) and "first token, 8 clients" in printed


def test_the_gpu_benchmark_runs_on_a_tiny_shape(capsys):
    arguments = ["--requests", "8", "--concurrency", "4", "--new_tokens", "6"]
    assert serve_gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 of 12 answers of 24 tokens equal" in printed
    # Eight answers of 24 tokens, in 32 bits: none parts from the other's.
    assert "captured against uncaptured steps: 192 tokens equal" in printed
    assert "transformers, generate_batch" in printed


def test_an_openai_server_is_asked():
    """Tokens are counted as the server tells; line separators in an answer break no line of the stream."""
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    chunks = [*({"choices": [{"delta": {"content": text}}]} for text in ("一\u2028二", "\x85")), usage]
    body = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    target, pieces = HttpTarget("http://service/v1", "m", None), []
    target.client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200, text=body)))
    assert asyncio.run(target.ask(Job(0, 1, 7), lambda: pieces.append(1))) == 7
    assert len(pieces) == 2
    body = 'data: {"error": {"message": "no memory"}}\n\n'
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(target.ask(Job(0, 1, 7), lambda: None))
