"""The interface of the engine: what demo, service, page and evaluation call, whichever engine runs.

    engine = load_engine(settings)                          # llm_code.module_interface.load
    request = engine.submit(engine.encode_chat(messages), SamplingParams(max_tokens=64))
    for event in request: print(event.text, end="")         # or request.result() -> Completion

Engines are thread-safe: any thread may submit, iterate and cancel. Nothing heavy is imported here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune.errors import UserError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
FINISH_REASONS = (STOP, LENGTH, CANCELLED, ERROR)


class EngineError(RuntimeError):
    """A request that could not be served. `retry_after` is a hint in seconds, None where a retry cannot help."""

    retry_after: float | None = None


class InvalidRequest(UserError):
    """A request that no engine of this model can serve; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    """Prompt plus answer exceed the context; the text has both numbers, so have the attributes.

    `prompt_field` is what the request calls its prompt.
    """

    def __init__(self, num_prompt_tokens: int, max_tokens: int, context: int, prompt_field: str = "prompt") -> None:
        super().__init__(
            f"this model's context is {context} tokens, but the request asks for {num_prompt_tokens + max_tokens}: "
            f"{num_prompt_tokens} in the prompt and {max_tokens} for the answer. Shorten either.",
            "max_tokens" if num_prompt_tokens < context else prompt_field,
        )
        self.num_prompt_tokens, self.max_tokens, self.context = num_prompt_tokens, max_tokens, context


class QueueFull(EngineError):
    """As many requests run and wait as the engine accepts; nothing was started."""

    retry_after = 1.0


class QueueTimeout(EngineError):
    """The request waited longer than EngineLimits.queue_timeout; it never started."""

    retry_after = 1.0


class RequestFailed(EngineError):
    """The computation of this one request failed (a bug, memory, scores that are no numbers); the others go on."""


class EngineClosed(EngineError):
    """The engine is draining or closed and accepts nothing new."""

    retry_after = 5.0


class EngineDead(EngineError):
    """The engine's thread has ended with an error; only a new process helps."""


class UpstreamError(EngineError):
    """The upstream server answered with an error or not at all; `status` is its HTTP status, None without answer."""

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Each request of a running batch keeps its own."""

    max_tokens: int | None = None  # None: as many as the context leaves; 0 only together with prompt_logprobs
    temperature: float = 1.0  # 0 is greedy, as is anything below 1e-6
    top_p: float = 1.0  # the smallest set of tokens with this probability
    top_k: int = 0  # 0: no limit
    seed: int | None = None  # the same request with the same seed gives the same text; None: a new seed each time
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    repetition_penalty: float = 1.0  # scores of tokens in prompt or answer: divided by it, or multiplied where negative
    frequency_penalty: float = 0.0  # subtracted once for every occurrence in the answer
    presence_penalty: float = 0.0  # subtracted once for every token that occurs in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its score
    logprobs: int | None = None  # None: none; n: each token's log-probability and its n likeliest alternatives
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, before the answer
    min_tokens: int = 0  # no end token and no stop string before
    ignore_eos: bool = False  # go on through end tokens up to max_tokens


@dataclass(frozen=True)
class Token:
    """One token with the text it completed: "" for the first bytes of a character, all of it for the last.

    Log-probabilities are those of the model itself: before temperature, penalties, bias and cuts. `logprob` is None
    where none was asked for and for the first token of a prompt.
    """

    id: int  # -1 where an upstream server does not tell
    text: str
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # (id, log-probability), likeliest first
    alternative_texts: tuple[str, ...] = ()  # beside `alternatives`, only from an upstream server


@dataclass(frozen=True)
class Event:
    """A step of an answer. `text` is the tokens' texts joined; the last event has a finish_reason and may have no text.

    Text that may turn out to be the beginning of a stop string, and half characters, are held back with their tokens.
    An end token, which ends the answer without a text, is not among `tokens`; num_tokens counts it.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt_tokens: tuple[Token, ...] = ()  # once, when prompt_logprobs was given
    finish_reason: str | None = None  # STOP, LENGTH, CANCELLED, ERROR
    stop_reason: str | int | None = None  # the stop string, or the end token's id
    end_token: Token | None = None  # the end token with its log-probability, in the last event
    error: EngineError | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, taken over from an earlier request
    num_tokens: int = 0  # computed for the answer so far


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    prompt_tokens: tuple[Token, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class EngineLimits:
    """What a request may ask for, and how many there may be."""

    context: int  # tokens of prompt and answer together
    vocabulary: int  # token ids are 0 .. vocabulary - 1
    max_batch: int  # requests computed at the same time
    max_queue: int  # requests waiting beyond those
    max_logprobs: int = 20
    queue_timeout: float | None = None  # seconds a request may wait to start


@dataclass(frozen=True)
class EngineStats:
    """A look at the engine; counters only grow. Cheap enough for every scrape."""

    alive: bool  # the thread runs and made a step lately, or has nothing to do
    running: int
    waiting: int
    cache_blocks_total: int
    cache_blocks_used: int  # by running requests
    cache_blocks_cached: int  # kept for prompts to come, given up when room is needed
    block_tokens: int
    seconds_since_step: float  # 0 while there is nothing to do
    requests: Mapping[str, int]  # finish reason -> requests ended so
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int


class Request(Protocol):
    """One running answer. Iterate its events once, in any thread; an error is raised by the iteration."""

    id: str

    def __iter__(self) -> Iterator[Event]: ...

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises the request's EngineError, TimeoutError after `timeout` seconds."""
        ...

    def cancel(self) -> None:
        """Leave the queue or the batch within two steps; the last event says CANCELLED. Harmless at any time."""
        ...


class Engine(Protocol):
    """Any engine. `submit` raises InvalidRequest, ContextTooLong, QueueFull, EngineClosed or EngineDead at once."""

    model_name: str
    weights_fingerprint: str | None  # None where the weights are in another process
    limits: EngineLimits
    defaults: SamplingParams  # what the checkpoint recommends in its generation config

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[Event], None] | None = None
    ) -> Request:
        """Start (or queue) an answer. With `on_event` the engine's thread calls it with every event, also the last
        one with its error, instead of keeping them for iteration; it must return at once (call_soon_threadsafe)."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Prompt ids in the model's chat format, ending with the assistant's header. Raises UserError."""
        ...

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def token_text(self, token_id: int) -> str:
        """A token by itself; special tokens by name, part of a character as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def generate(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion: ...

    def stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one answer; leaving the iteration cancels the request."""
        ...

    def predict(self, query: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The answer to one question after earlier (question, answer) pairs."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self, drain_seconds: float = 0.0) -> None:
        """Accept nothing new, let running requests finish for so long, cancel the rest, free everything. Waiting
        requests end with EngineClosed at once. Idempotent."""
        ...


def messages_of(query: str, history: Sequence[tuple[str, str]] = (), system: str | None = None) -> list[dict[str, Any]]:
    """Role/content messages of earlier (question, answer) pairs and a new question."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": query}]
