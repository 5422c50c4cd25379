"""What may go wrong around a request, and whom it may touch: that request alone, and nothing it held stays held."""

import threading
import time

import pytest
import torch

from llm_code.module_interface import worker as worker_module
from llm_code.module_interface.interface import (
    ContextTooLong,
    EngineClosed,
    EngineDead,
    QueueFull,
    QueueTimeout,
    RequestFailed,
    SamplingParams,
)
from tests.engines import CONTEXT, answer, engine, greedy, model, prompts, token_ids


class Gate:
    """Lets the engine's thread make one step at a time, when the test says so."""

    def __init__(self, running) -> None:
        self.worker, self.steps = running._worker, threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        step = self.worker._step

        def gated() -> None:
            self.steps.acquire()
            step()
            self.done.release()

        self.worker._step = gated

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps.release()
            assert self.done.acquire(timeout=20)

    def open(self) -> None:
        self.steps.release(10**6)


def idle(running) -> bool:
    """Whether the engine has nothing left of any request but prompts it may reuse."""
    deadline = time.monotonic() + 20
    while running.stats().running + running.stats().waiting and time.monotonic() < deadline:
        time.sleep(0.005)
    stats, scheduler = running.stats(), running._worker.scheduler
    return (
        (stats.running, stats.waiting, stats.cache_blocks_used) == (0, 0, 0)
        and len(scheduler.free_slots) == running.limits.max_batch
        and not running._worker.is_busy
    )


def test_the_queue_is_bounded_and_every_accepted_request_is_served():
    running = engine(max_batch=2, max_queue=3)
    gate, asked, accepted = Gate(running), prompts(*[5] * 12), []
    for prompt in asked:
        try:
            accepted.append(running.submit(prompt, greedy(4)))
        except QueueFull as error:
            assert "5 requests" in str(error) and error.retry_after
    assert len(accepted) == 5
    assert running.stats().waiting == 5
    gate.step()
    assert (running.stats().running, running.stats().waiting) == (2, 3)
    gate.open()
    assert [token_ids(r.result(30)) for r in accepted] == [answer(model(), p, 4) for p in asked[:5]]
    assert idle(running)
    assert len(running.submit(asked[0], greedy(4)).result(30).tokens) == 4
    running.close()


def test_too_long_requests_are_refused_with_both_numbers():
    running = engine()
    with pytest.raises(ContextTooLong) as caught:
        running.submit(prompts(200)[0], greedy(100))
    assert (caught.value.num_prompt_tokens, caught.value.max_tokens, caught.value.context) == (200, 100, CONTEXT)
    assert "256" in str(caught.value) and "300" in str(caught.value) and caught.value.param == "max_tokens"
    with pytest.raises(ContextTooLong):
        running.submit(prompts(CONTEXT)[0], SamplingParams())
    with pytest.raises(ContextTooLong):
        running.submit([1], greedy(10**12))
    running.close()


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("when", ["queue", "prefill", "decode"])
def test_a_cancelled_request_is_gone_after_two_steps(when, lookahead):
    running = engine(max_batch=1 if when == "queue" else 2, prefill_tokens=8, lookahead=lookahead)
    gate, (first, second) = Gate(running), prompts(3, 60)
    other = running.submit(first, greedy(20))
    gate.step()
    request = running.submit(second, greedy(50))
    gate.step({"queue": 2, "prefill": 3, "decode": 12}[when])
    assert (running.stats().running, running.stats().waiting) == ((1, 1) if when == "queue" else (2, 0))
    request.cancel()
    gate.step(2)
    assert (running.stats().running, running.stats().waiting) == (1, 0)
    completion = request.result(30)
    assert completion.finish_reason == "cancelled"
    assert bool(completion.tokens) == (when == "decode")
    gate.open()
    assert token_ids(other.result(30)) == answer(model(), first, 20)
    assert idle(running)
    assert running.stats().requests == {"cancelled": 1, "length": 1}
    running.close()


def test_leaving_a_stream_cancels_it(tiny_qwen):
    from finetune.models import load_for_inference
    from llm_code.module_interface.local_engine import LocalEngine

    running = LocalEngine(*load_for_inference(tiny_qwen, dtype="float32"))
    for _ in running.stream([{"role": "user", "content": "你好"}], greedy(400, ignore_eos=True)):
        break
    assert idle(running)
    assert running.stats().requests == {"cancelled": 1}
    assert running.predict("你好", [("一", "二")]) is not None
    running.close()


def test_many_clients_come_and_go():
    """Threads that cancel at random moments; what is left answers exactly, and nothing leaks."""
    running, asked = engine(max_queue=100, lookahead=True), prompts(*[5, 30, 12, 50] * 10, seed=4)
    requests = [running.submit(prompt, greedy(6)) for prompt in asked]
    for number, request in enumerate(requests):
        if number % 3 == 0:
            threading.Timer(0.01 * (number % 7), request.cancel).start()
    for number, (prompt, request) in enumerate(zip(asked, requests, strict=True)):
        completion = request.result(30)
        assert completion.finish_reason in (("cancelled", "length") if number % 3 == 0 else ("length",))
        assert token_ids(completion) == answer(model(), prompt, 6)[: len(completion.tokens)]
    assert idle(running)
    running.close()


def test_an_error_in_one_request_ends_that_request():
    """In the choice of its token, in its text, and in its consumer."""
    running, asked = engine(), prompts(5, 6, 7, 8)

    def refuse(event) -> None:
        raise OSError("the consumer has gone")

    spoilt = running.submit(asked[0], greedy(8))
    running.submit(asked[1], greedy(8), refuse)
    good = running.submit(asked[2], greedy(8))
    accept = running._worker._accept

    def accept_all_but_one(sequence, token) -> None:
        if sequence.request is spoilt and len(sequence.tokens) == 3:
            raise ValueError("a bug in the sampler")
        accept(sequence, token)

    running._worker._accept = accept_all_but_one
    with pytest.raises(RequestFailed, match="ValueError: a bug in the sampler"):
        spoilt.result(30)
    assert token_ids(good.result(30)) == answer(model(), asked[2], 8)
    assert idle(running)
    assert running.stats().alive and running.stats().requests == {"error": 2, "length": 1}
    running.close()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("out of memory")])
@pytest.mark.parametrize("lookahead", [False, True])
def test_an_error_in_the_computation_is_isolated(error, lookahead):
    """A forward pass that fails whenever one request is in it, in prefill and later: the others' answers are exact."""
    running, asked = engine(lookahead=lookahead), prompts(5, 40, 7)
    launch, spoilt = running._worker.runner.launch, []

    def fail_with_one(step):
        inside = [*step.decode, *(chunk.sequence for chunk in step.chunks)]
        if any(sequence.request in spoilt and sequence.num_chosen >= 2 for sequence in inside):
            raise error
        return launch(step)

    running._worker.runner.launch = fail_with_one
    requests = [running.submit(prompt, greedy(10)) for prompt in asked]
    spoilt.append(requests[1])
    for number in (0, 2):
        assert token_ids(requests[number].result(30)) == answer(model(), asked[number], 10)
    with pytest.raises(RequestFailed, match=type(error).__name__):
        requests[1].result(30)
    assert idle(running)
    assert token_ids(running.submit(asked[1], greedy(4)).result(30)) == answer(model(), asked[1], 4)
    running.close()


def test_a_batch_too_large_for_memory_is_computed_in_parts():
    """Nobody fails when a step fits request by request."""
    running, asked = engine(), prompts(5, 40, 7)
    launch = running._worker.runner.launch

    def only_small(step):
        if len(step.decode) + len(step.chunks) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return launch(step)

    running._worker.runner.launch = only_small
    requests = [running.submit(prompt, greedy(10)) for prompt in asked]
    assert [token_ids(r.result(30)) for r in requests] == [answer(model(), p, 10) for p in asked]
    running.close()


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error: an illegal memory access"), SystemExit(3)])
def test_a_dead_thread_is_told_to_everyone(failure):
    deaths: list[EngineDead] = []
    running = engine(max_batch=1, on_death=deaths.append)
    gate = Gate(running)
    requests = [running.submit(prompt, greedy(30)) for prompt in prompts(4, 5)]
    gate.step(2)

    def die(step):
        raise failure

    running._worker.runner.launch = die
    gate.open()
    for request in requests:
        with pytest.raises(EngineDead, match=type(failure).__name__):
            request.result(10)
    running._worker.thread.join(10)
    assert not running.stats().alive and len(deaths) == 1
    with pytest.raises(EngineDead):
        running.submit([1], greedy(1))
    running.close()


def test_a_thread_that_hangs_is_not_alive(monkeypatch):
    monkeypatch.setattr("llm_code.module_interface.local_engine.STALLED_SECONDS", 0.05)
    running = engine()
    assert running.stats().alive
    gate = Gate(running)
    request = running.submit([1, 2], greedy(2))
    time.sleep(0.1)
    assert not running.stats().alive and running.stats().seconds_since_step > 0.05
    gate.open()
    request.result(10)
    assert idle(running) and running.stats().alive
    running.close()


def test_waiting_has_a_limit():
    running = engine(max_batch=1, queue_timeout=0.05)
    gate = Gate(running)
    first, second = (running.submit(prompt, greedy(3)) for prompt in prompts(4, 5))
    gate.step()
    time.sleep(0.1)
    gate.step()
    with pytest.raises(QueueTimeout, match="waited 0.1 s"):
        second.result(10)
    gate.open()
    assert len(first.result(10).tokens) == 3
    assert idle(running)
    running.close()


def test_closing_lets_running_requests_finish_and_ends_waiting_ones():
    running = engine(max_batch=1)
    gate = Gate(running)
    first, second = (running.submit(prompt, greedy(20)) for prompt in prompts(4, 5))
    gate.step(2)
    gate.open()
    running.close(drain_seconds=20)
    assert len(first.result(1).tokens) == 20
    with pytest.raises(EngineClosed, match="had not started"):
        second.result(1)
    with pytest.raises(EngineClosed):
        running.submit([1], greedy(1))
    running.close()


def test_closing_without_patience_cancels():
    running = engine()
    gate = Gate(running)
    request = running.submit([1, 2, 3], greedy(100))
    gate.step(3)
    threading.Timer(0.05, gate.open).start()
    running._worker._stopping = True
    running.close()
    assert request.result(1).finish_reason == "cancelled"


def test_the_cache_is_bounded_and_admits_by_tokens():
    """Room for 10 blocks: two requests of 5 blocks run at once, the third waits although a slot is free."""
    lm = model()
    block = 2 * 2 * 2 * 16 * 4 * 16  # key and value, layers, heads, head size, float32, tokens
    running = engine(lm=lm, cache_bytes=10 * block + 100)
    gate, asked = Gate(running), prompts(70, 70, 70, 3)
    assert running.stats().cache_blocks_total == 10
    assert sum(layer.nbytes for layer in running._worker.scheduler.pool.layers) == 11 * block  # one is scratch
    assert running.limits.context == 160
    requests = [running.submit(prompt, greedy(10)) for prompt in asked]
    gate.step()
    assert (running.stats().running, running.stats().waiting, running.stats().cache_blocks_used) == (2, 2, 10)
    gate.open()
    assert [token_ids(r.result(30)) for r in requests] == [answer(model(), p, 10) for p in asked]
    assert idle(running)
    running.close()


@pytest.mark.parametrize("lookahead", [False, True])
def test_answers_that_outgrow_the_cache_are_set_back_and_go_on(monkeypatch, lookahead):
    """Room for 12 blocks and four answers that need 7 or 8 each: greedy and sampled ones, with penalties and scores."""
    monkeypatch.setattr("llm_code.module_interface.scheduler.ROOM", 16)
    block = 2 * 2 * 2 * 16 * 4 * 16
    asked = prompts(30, 20, 25, 40)
    settings = [
        greedy(80, stop=("nowhere",)),
        SamplingParams(max_tokens=90, seed=3, logprobs=2),
        greedy(85, repetition_penalty=1.2, frequency_penalty=0.3),
        SamplingParams(max_tokens=70, seed=4, top_p=0.8, prompt_logprobs=1),
    ]
    spacious = engine(lookahead=lookahead)
    expected = [spacious.submit(p, s).result(30) for p, s in zip(asked, settings, strict=True)]
    running = engine(lookahead=lookahead, cache_bytes=12 * block + 100)
    requests = [running.submit(p, s) for p, s in zip(asked, settings, strict=True)]
    for request, wanted in zip(requests, expected, strict=True):
        found = request.result(60)
        assert token_ids(found) == token_ids(wanted) and found.text == wanted.text
        assert len(found.prompt_tokens) == len(wanted.prompt_tokens)
        scores = [token.logprob for token in wanted.tokens]
        assert [t.logprob for t in found.tokens] == (scores if None in scores else pytest.approx(scores, abs=1e-4))
    assert running._worker.scheduler.num_set_back > 0
    assert token_ids(expected[0]) == answer(model(), asked[0], 80)
    assert idle(running) and running.stats().generated_tokens == 325
    running.close(), spacious.close()


def test_an_answer_alone_may_fill_the_whole_cache(monkeypatch):
    """Also from a place where it can neither grow nor be copied elsewhere."""
    monkeypatch.setattr("llm_code.module_interface.scheduler.ROOM", 16)
    block = 2 * 2 * 2 * 16 * 4 * 16
    running = engine(cache_bytes=10 * block + 100)
    gate, asked = Gate(running), prompts(40, 33)
    first = running.submit(asked[0], greedy(2))
    second = running.submit(asked[1], greedy(160 - 33))
    gate.open()
    assert token_ids(first.result(30)) == answer(model(), asked[0], 2)
    assert token_ids(second.result(30)) == answer(model(), asked[1], 160 - 33)
    assert idle(running)
    running.close()


def test_a_long_prompt_delays_nobody():
    """While 200 tokens are prefilled 16 at a time, a running answer gets a token every step, a short prompt starts."""
    running = engine(prefill_tokens=16)
    gate, (answering, long, short) = Gate(running), prompts(3, 200, 6)
    first = running.submit(answering, greedy(100))
    gate.step()
    second = running.submit(long, greedy(5))
    gate.step(2)
    third = running.submit(short, greedy(5))
    gate.step(3)  # the first of them had begun when the short prompt came
    sequences = {s.request: s for s in running._worker.scheduler.running}
    assert len(sequences[first].tokens) == 6
    assert len(sequences[third].tokens) == 2 and sequences[second].is_prefilling
    gate.step(12)  # half of each step's tokens at least are the long prompt's
    assert not sequences[second].is_prefilling
    gate.open()
    assert token_ids(second.result(30)) == answer(model(), long, 5)
    running.close()


def test_the_error_of_a_step_is_shortened():
    text = worker_module._describe(ValueError("line one\n" + "x" * 1000))
    assert text.startswith("ValueError: line one x") and len(text) < 250
