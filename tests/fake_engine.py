"""A scripted engine: the interface without a model, for faults a real one shows only by accident.

A token is a character. The last message says what happens: `say TEXT` answers TEXT; `endless` answers letters up to
max_tokens; `prefill N` takes N steps before its first token, `gap N` before its second; `fail N` breaks after N
tokens; `die` ends the thread; `stick` stops it without a word; anything else is answered with itself.
"""

import itertools
import threading
import time
from collections import Counter, deque

from llm_code.module_interface import interface
from llm_code.module_interface.interface import Event, Token

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SEPARATOR = "\x1e"  # between messages


class FakeRequest:
    """The request handed out; `engine` may be told to cancel it."""

    numbers = itertools.count()

    def __init__(self, prompt_ids, params, on_event):
        self.id, self.params, self.on_event = f"fake-{next(self.numbers)}", params, on_event
        self.prompt_ids, self.submitted, self.cancelled, self.done = prompt_ids, time.monotonic(), False, 0
        prompt = "".join(map(chr, prompt_ids))
        command, _, rest = prompt.rpartition(SEPARATOR)[2].partition(" ")
        self.command = command
        self.number = int(rest) if command in ("prefill", "gap", "fail") and rest.isdigit() else 0
        self.wait = self.number if command == "prefill" else 0
        endless = command in ("endless", "prefill", "fail", "die", "stick")
        self.answer = itertools.cycle(LETTERS) if endless else iter(rest if command == "say" else prompt)

    def cancel(self):
        self.cancelled = True

    def step(self):
        """The event of one step, None in prefill."""
        if self.wait > 0:
            self.wait -= 1
            return None
        if self.command == "fail" and self.done >= self.number:
            raise FloatingPointError("scores of /secret/path at 0x7f00 are no numbers")
        letter = next(self.answer, None) if self.done < self.params.max_tokens else ""
        if not letter:
            return self.end(interface.STOP if letter is None else interface.LENGTH)
        self.done += 1
        if self.command == "gap" and self.done == 1:
            self.wait = self.number
        alternatives = tuple((ord(letter) + place, -0.5 - place) for place in range(self.params.logprobs or 0))
        logprob = None if self.params.logprobs is None else -0.5
        token = Token(ord(letter), letter, logprob, alternatives)
        if self.done == self.params.max_tokens:
            return self.end(interface.LENGTH, letter, (token,))
        return Event(text=letter, tokens=(token,), prompt_tokens=self.scored_prompt() if self.done == 1 else ())

    def scored_prompt(self):
        if self.params.prompt_logprobs is None:
            return ()
        return tuple(Token(i, chr(i), -0.5 if place else None) for place, i in enumerate(self.prompt_ids))

    def end(self, reason, text="", tokens=(), error=None):
        counts = {"num_prompt_tokens": len(self.prompt_ids), "num_tokens": self.done}
        prompt = self.scored_prompt() if self.done <= 1 and reason == interface.LENGTH else ()
        return Event(text=text, tokens=tokens, prompt_tokens=prompt, finish_reason=reason, error=error, **counts)


class FakeEngine:
    weights_fingerprint = None

    def __init__(
        self,
        step_seconds=0.005,
        max_batch=4,
        max_queue=4,
        context=4096,
        queue_timeout=None,
        load_seconds=0,
        refusal=None,
    ):
        time.sleep(load_seconds)
        if refusal:
            raise interface.UserError(refusal)
        self.model_name, self.defaults = "fake", interface.SamplingParams()
        self.limits = interface.EngineLimits(context, 0x110000, max_batch, max_queue, queue_timeout=queue_timeout)
        self.step_seconds, self.ended, self.steps, self.generated = step_seconds, Counter(), 0, 0
        self.lock, self.waiting, self.running = threading.Lock(), deque(), []
        self.alive, self.closing, self.deadline, self.encoded = True, False, 0.0, 0
        self.started_prompts = []
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def submit(self, prompt_ids, params, on_event=None):
        with self.lock:
            if not self.alive:
                raise interface.EngineDead("dead")
            if self.closing:
                raise interface.EngineClosed("closing")
            if len(self.waiting) + len(self.running) >= self.limits.max_batch + self.limits.max_queue:
                raise interface.QueueFull("full")
            request = FakeRequest(prompt_ids, params, on_event)
            self.waiting.append(request)
        return request

    def work(self):
        while self.alive:
            time.sleep(self.step_seconds)
            with self.lock:
                self.step()

    def step(self):
        for request in [request for request in self.waiting if self.leaves(request)]:
            self.waiting.remove(request)
        while self.waiting and len(self.running) < self.limits.max_batch:
            self.running.append(self.waiting.popleft())
            self.started_prompts.append(self.running[-1].prompt_ids)
        for request in list(self.running):
            if request.command in ("die", "stick"):
                return self.die(tell=request.command == "die")
            self.advance(request)
        self.steps += bool(self.running)

    def leaves(self, request):
        late = self.limits.queue_timeout and time.monotonic() - request.submitted > self.limits.queue_timeout
        if request.cancelled:
            self.finish(request, request.end(interface.CANCELLED))
        elif self.closing:
            self.finish(request, request.end(interface.ERROR, error=interface.EngineClosed("closing")))
        elif late:
            self.finish(request, request.end(interface.ERROR, error=interface.QueueTimeout("late")))
        return request.cancelled or self.closing or late

    def advance(self, request):
        try:
            overdue = self.closing and time.monotonic() > self.deadline
            event = request.end(interface.CANCELLED) if request.cancelled or overdue else request.step()
        except FloatingPointError as error:
            event = request.end(interface.ERROR, error=interface.RequestFailed(str(error)))
        if event is None:
            return
        self.generated += len(event.tokens)
        if event.finish_reason:
            self.running.remove(request)
            self.finish(request, event)
        else:
            request.on_event(event)

    def finish(self, request, event):
        self.ended[event.finish_reason] += 1
        request.on_event(event)

    def die(self, tell):
        self.alive = False
        for request in [*self.running, *self.waiting] if tell else []:
            self.finish(request, request.end(interface.ERROR, error=interface.EngineDead("dead")))
        self.running, self.waiting = [], deque()

    def encode_chat(self, messages):
        if messages[-1]["role"] == "tool":
            raise interface.UserError("this template has no role tool")
        return self.encode_text(SEPARATOR.join(message["content"] for message in messages))

    def encode_text(self, text, add_special_tokens=True):
        self.encoded += len(text)
        return list(map(ord, text))

    def token_text(self, token_id):
        return chr(token_id)

    def token_bytes(self, token_id):
        return chr(token_id).encode()

    def stats(self):
        counts = {"cache_blocks_total": 64, "cache_blocks_used": len(self.running), "cache_blocks_cached": 0}
        ended = {"requests": dict(self.ended), "prompt_tokens": 0, "cached_tokens": 0}
        seen = {"generated_tokens": self.generated, "steps": self.steps, "seconds_since_step": 0, "block_tokens": 16}
        return interface.EngineStats(self.alive, len(self.running), len(self.waiting), **counts, **ended, **seen)

    def close(self, drain_seconds=0.0):
        if not self.closing:
            self.deadline, self.closing = time.monotonic() + drain_seconds, True
        while self.alive and (self.running or self.waiting):
            time.sleep(0.005)
        self.alive = False
