"""The engine's thread: takes requests in, runs step after step, hands out tokens, and contains what goes wrong.

With lookahead (on a GPU) a step is started before the tokens of the one before are read: the host's work hides behind
the device's. A request that turns out to have ended then computed one token that nobody sees.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llm_code.module_interface.interface import (
    CANCELLED,
    ERROR,
    LENGTH,
    EngineClosed,
    EngineDead,
    RequestFailed,
    Token,
)
from llm_code.module_interface.runner import Pending, Runner
from llm_code.module_interface.scheduler import Scheduler, Step
from llm_code.module_interface.sequence import Sequence


class Worker:
    """Owns the scheduler and the runner. `submit`, `cancel`, `stop` and the counters may be used by any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        end_ids: frozenset[int],
        lookahead: bool,
        on_death: Callable[[EngineDead], None],
        describe_prompt: Callable[[list[int]], list[str]],
    ) -> None:
        self.scheduler, self.runner, self.end_ids, self.lookahead = scheduler, runner, end_ids, lookahead
        self.on_death, self.describe_prompt = on_death, describe_prompt
        self.error: EngineDead | None = None
        self.steps = 0
        self.last_step = time.monotonic()
        self._inbox: deque[Sequence] = deque()
        self._condition = threading.Condition()
        self._accepted = 0  # requests not ended yet
        self._pending: Pending | None = None
        self._draining = self._stopping = False
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()
        self._ready.wait()
        if self.error is not None:
            raise self.error

    @property
    def num_accepted(self) -> int:
        """Requests running and waiting."""
        return self._accepted

    @property
    def is_busy(self) -> bool:
        return self._accepted > 0

    @property
    def seconds_since_step(self) -> float:
        """How long the last step has been; 0 while there is nothing to do."""
        return time.monotonic() - self.last_step if self.is_busy else 0.0

    def submit(self, sequence: Sequence, limit: int) -> bool:
        """Queue a sequence; False when `limit` requests run or wait. Raises EngineClosed or EngineDead."""
        with self._condition:
            if self.error is not None:
                raise self.error
            if self._draining:
                raise EngineClosed("the engine is shutting down and accepts nothing new.")
            if self._accepted >= limit:
                return False
            if not self.is_busy:
                self.last_step = time.monotonic()
            self._accepted += 1
            self._inbox.append(sequence)
            self._condition.notify()
        return True

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out before the step after the next one."""
        sequence.cancelled = True

    def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, end the waiting ones, let the running ones finish for so long, then end the thread."""
        with self._condition:
            self._draining = True
            self._condition.notify()
        deadline = time.monotonic() + drain_seconds
        while self.is_busy and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _run(self) -> None:
        try:
            self.runner.prepare()
            self._ready.set()
            while self._wait():
                self._step()
        except BaseException as error:  # whatever it is: nobody may wait for this thread
            self._die(error)
        else:
            self._end_all(CANCELLED)

    def _wait(self) -> bool:
        """Sleep until there is work; False when the thread should end."""
        with self._condition:
            while not (self._stopping or self._inbox or self.is_busy or self._draining and self.scheduler.waiting):
                self._condition.wait()
            self.scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
            draining = self._draining
        if draining:
            closed = EngineClosed("the engine is shutting down; the request had not started.")
            for sequence in [s for s in self.scheduler.waiting if s.request.started is None]:
                self._end(sequence, ERROR, closed)
        return not self._stopping

    def _step(self) -> None:
        before = sum(self.scheduler.ended.values())
        step = self.scheduler.plan()
        self._settle(before)
        pending = self._launch(step) if step else None
        if self.lookahead:
            pending, self._pending = self._pending, pending
        if pending:
            self._deliver(pending)
        self.steps += 1
        self.last_step = time.monotonic()

    def _settle(self, before: int) -> None:
        """Count the requests that the scheduler itself has ended."""
        with self._condition:
            self._accepted -= sum(self.scheduler.ended.values()) - before

    def _launch(self, step: Step) -> Pending | None:
        try:
            return self.runner.launch(step)
        except Exception as error:
            if _is_fatal(error):
                raise
            return self._isolate(step, error)

    def _isolate(self, step: Step, error: Exception) -> Pending | None:
        """After a failed step: run it again sequence by sequence, so that only those end that fail by themselves."""
        if self._pending:
            self._deliver(self._pending)
            self._pending = None
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            self.scheduler.make_room()
            self.runner.free_memory()
        del error  # its traceback holds the failed step's tensors
        for part in step.parts():
            sequence = part.decode[0] if part.decode else part.chunks[0].sequence
            if sequence.finished or (part.decode and not sequence.wants_token):
                continue
            try:
                self._deliver(self.runner.launch(part))
            except Exception as failure:
                if _is_fatal(failure):
                    raise
                self._end(sequence, ERROR, RequestFailed(f"computing this request failed: {_describe(failure)}"))
        return None

    def _deliver(self, pending: Pending) -> None:
        """Hand the tokens of a finished step to their requests."""
        for chunk, scores in pending.prompt_scores:
            if not chunk.sequence.finished:
                self._guarded(chunk.sequence, lambda c=chunk, s=scores: self._note_prompt(c, s))
        for sequence, token in pending.answers():
            if not sequence.finished:
                self._guarded(sequence, lambda s=sequence, t=token: self._accept(s, t))
        for sequence in pending.finished_prompts:
            if not sequence.finished:
                self._guarded(sequence, lambda s=sequence: s.finish(LENGTH))

    def _guarded(self, sequence: Sequence, action: Callable[[], None]) -> None:
        """Run one request's part; what it raises ends that request alone."""
        try:
            action()
        except Exception as error:
            self._end(sequence, ERROR, RequestFailed(f"this request failed: {_describe(error)}"))
            return
        if sequence.finished:
            self._leave(sequence)

    def _accept(self, sequence: Sequence, token: Token) -> None:
        if token.id < 0:
            raise ArithmeticError("the model's scores are not finite numbers")
        sequence.accept(token, self.end_ids)

    def _note_prompt(self, chunk: Any, scores: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        sequence, wanted = chunk.sequence, chunk.sequence.params.prompt_logprobs
        if chunk.begin == 0:
            texts = self.describe_prompt(sequence.prompt)
            sequence.prompt_tokens = [Token(i, text) for i, text in zip(sequence.prompt, texts, strict=True)]
        rows = zip(*(tensor.tolist() for tensor in scores), strict=True)
        for place, (logprob, ids, logprobs) in enumerate(rows, start=chunk.begin + 1):
            alternatives = tuple(zip(ids[:wanted], logprobs[:wanted], strict=True))
            known = sequence.prompt_tokens[place]
            sequence.prompt_tokens[place] = replace(known, logprob=logprob, alternatives=alternatives)

    def _leave(self, sequence: Sequence) -> None:
        reason = sequence.finish_reason or ERROR
        self.scheduler.leave(sequence, reason)
        with self._condition:
            self._accepted -= 1

    def _end(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        before = sum(self.scheduler.ended.values())
        self.scheduler.end(sequence, reason, error)
        self._settle(before)

    def _end_all(self, reason: str, error: Exception | None = None) -> None:
        with self._condition:
            self.scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(sequence, reason, error)

    def _die(self, cause: BaseException) -> None:
        error = EngineDead(f"the engine has stopped with an error: {_describe(cause)}")
        error.__cause__ = cause
        with self._condition:
            self.error = error
        self._end_all(ERROR, error)
        if self._ready.is_set():
            self.on_death(error)
        self._ready.set()


def _is_fatal(error: Exception) -> bool:
    """Whether the device is of no more use: after an illegal access every further call fails."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
