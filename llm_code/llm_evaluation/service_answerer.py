"""Prompts answered by a service that speaks the OpenAI protocol, several requests at a time."""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.partial_results import config_hash
from llm_code.llm_evaluation.answering import Answers, Batch, Decoding, Prompt
from llm_code.service.settings import own_key

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 6
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
# What the other ways to answer do; a service takes the checkpoint's own where it is not told. -1 is no limit for every
# vLLM, some refuse 0.
PLAIN = {"repetition_penalty": 1.0, "top_k": -1}
TOO_LONG = ("context_length_exceeded", "maximum context length")  # the protocol's code, vLLM's words
TIMEOUT_SECONDS = 600.0
LONGEST_WAIT_SECONDS = 30.0
SHOWN = 60  # characters of a question at its beginning and its end, where questions differ


class Refused(UserError):
    """The service has no answer; `reply` is the text of its last reply, empty where it sent none."""

    def __init__(self, message: str, reply: str) -> None:
        super().__init__(message)
        self.reply = reply


class TooLong(UserError):
    """A question that does not fit the service's context."""


@dataclass
class Service:
    """`url` is the address with or without /v1; the first model that it lists answers."""

    url: str
    decoding: Decoding
    concurrency: int = 16
    extensions: dict[str, Any] = field(default_factory=PLAIN.copy)  # empty once the service has refused them

    @property
    def base_url(self) -> str:
        """The address with /v1."""
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    @cached_property
    def client(self) -> "httpx.Client":
        """One pool of connections for all threads."""
        import httpx

        key = own_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        is_here = httpx.URL(self.base_url).host in ("127.0.0.1", "localhost", "::1")
        # a proxy that the environment names cannot reach this machine
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=not is_here)

    @cached_property
    def model(self) -> str:
        """Id of the model."""
        return self.card["id"]

    @cached_property
    def card(self) -> dict[str, Any]:
        """What the service says of its first model. Raises UserError when it does not list one."""
        listed = self.request("GET", "models").get("data") or []
        if not listed:
            raise UserError(f"{self.base_url}: expected a model in /v1/models, found none.")
        return listed[0]

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Address, and the model as the service names it with the fingerprint of its weights.

        Our own service tells it. Of others, such as vLLM, only id and root are known, since their `created` is the time
        of the request: their finished results are never reused, those of an interrupted run are, and stderr says so.
        """
        weights = self.card.get("weights_fingerprint")
        if not weights:
            print(
                f"{self.base_url} does not say which weights it serves: finished answers are asked for again, an "
                "interrupted run goes on. Remove its partial file if the model was changed since.",
                file=sys.stderr,
            )
        asked = config_hash({"texts": [prompt.text for prompt in prompts]})
        place = {"answer": "service", "service": self.base_url, "model": self.model, "prompts": asked}
        place |= {"weights": weights, "root": self.card.get("root")}
        return place | vars(self.decoding) | PLAIN

    def plan(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """One prompt a request; the service makes its own batches. Longest first, as they take longest."""
        return [[number] for number in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].text), i))]

    def answer(self, prompts: Sequence[Prompt], batches: Sequence[Batch]) -> Iterator[Answers]:
        """Raises UserError: at the end for questions that are too long, else when those on their way are answered."""
        numbers, too_long = [number for batch in batches for number in batch], []
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self.ask, number, prompts[number].text): number for number in numbers}
            waiting = set(asked)
            try:
                for future in as_completed(asked):
                    waiting.remove(future)
                    error = future.exception()
                    if error is None:
                        yield [(asked[future], future.result())]
                    elif isinstance(error, TooLong):
                        too_long.append(error)
                    else:
                        pool.shutdown(cancel_futures=True)
                        yield from (
                            [(asked[f], f.result())] for f in waiting if not f.cancelled() and not f.exception()
                        )
                        raise error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if too_long:
            raise UserError(
                f"{self.base_url}: {len(too_long)} of {len(prompts)} questions do not fit the service's context, first "
                f"{too_long[0]}. Start the service with a longer context and run again: all other answers are kept."
            )

    def ask(self, number: int, text: str) -> str:
        """One answer; with sampling every prompt has its own seed. Raises TooLong, and UserError as `request` does."""
        decoding = self.decoding
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
        if decoding.temperature > 0:
            body |= {"top_p": decoding.top_p, "seed": decoding.seed + number}
        extensions = self.extensions
        try:
            reply = self.request("POST", "chat/completions", body | extensions)
        except Refused as refused:
            if any(name in refused.reply for name in extensions):
                print(f"{self.base_url} refuses {', '.join(extensions)}: its defaults apply", file=sys.stderr)
                self.extensions = {}
                return self.ask(number, text)
            if any(words in refused.reply for words in TOO_LONG):
                raise TooLong(f"question {number + 1}, {_shown(text)}: {refused.reply[:300]}") from None
            raise
        return reply["choices"][0]["message"]["content"] or ""

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON of a reply; a busy service is asked again. Raises Refused when it refuses or stays away."""
        import httpx

        problem = text = ""
        for attempt in range(ATTEMPTS):
            wait = min(2.0**attempt / 4, LONGEST_WAIT_SECONDS)
            try:
                reply = self.client.request(method, path, json=body)
            except httpx.TransportError as error:
                problem, text = str(error) or type(error).__name__, ""
            else:
                if reply.is_success:
                    return reply.json()
                text = reply.text
                problem = f"HTTP {reply.status_code}: {text[:300]}"
                if reply.status_code not in TRY_AGAIN or reply.headers.get("x-should-retry") == "false":
                    break
                wait = _seconds(reply.headers.get("Retry-After"), wait)
            if attempt < ATTEMPTS - 1:
                time.sleep(wait)
        raise Refused(
            f"{self.base_url}/{path}: {problem}. Check that the service runs (`make baichuan-serve`), its address and "
            "API_KEY, and run again: answers that are there are kept.",
            text,
        )


def _shown(text: str) -> str:
    """A question in a message."""
    return repr(text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}")


def _seconds(header: str | None, otherwise: float) -> float:
    """Retry-After in seconds, where it is a number."""
    try:
        return min(float(header or ""), LONGEST_WAIT_SECONDS)
    except ValueError:
        return otherwise
