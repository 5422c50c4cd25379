"""The requests: their fields, types and ranges (pydantic), as OpenAI's clients send them.

Unknown fields are ignored, as OpenAI's API does; what would change the answer and is not supported is refused.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_code.service.errors import ApiError, invalid
from llm_code.service.fields import MAX_PROMPTS, Biases, Content, Prompts, Stops, Unsupported

MAX_CHOICES = 8
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenCount = Annotated[int, Field(ge=1, le=2**31)]


class Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(Request):
    include_usage: bool | None = None


class Sampling(Request):
    """What both kinds of completion have in common; None is the model's own default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops = ()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Biases = Field(default_factory=dict)
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    ignore_eos: bool | None = None
    continue_final_message: Unsupported = None

    def check(self) -> None:
        """Raise ApiError where two fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream: true", "stream_options")


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None


class ResponseFormat(Request):
    type: Literal["text"]


class ChatCompletionRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Unsupported = None
    functions: Unsupported = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        for index, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise invalid("expected a content", f"messages[{index}].content")

    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def plain_messages(self) -> list[dict[str, str]]:
        """Role and content, as the engine takes them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.content or ""} for m in self.messages]


class CompletionRequest(Sampling):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Unsupported = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens: 0 needs echo: true", "max_tokens")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of other than n is not supported", "best_of")
        if len(self.prompt) * (self.n or 1) > MAX_PROMPTS:
            raise invalid(f"expected at most {MAX_PROMPTS} prompts times n", "prompt")


class AskRequest(Request):
    """The walkthrough's request. Only `query` decides the answer; the rest is the caller's own bookkeeping."""

    query: Annotated[str, Field(min_length=1)]
    apiType: Literal["ask"] | None = None
    appid: str | int | None = None
    userId: str | int | None = None
    sessionId: str | int | None = None
    logId: str | int | None = None
    query_type: str | int | None = None

    def check(self) -> None:
        """Nothing can contradict."""


AnyRequest = TypeVar("AnyRequest", ChatCompletionRequest, CompletionRequest, AskRequest)


def validated(kind: type[AnyRequest], value: Any) -> AnyRequest:
    """The request in a JSON value. Raises ApiError 400 that names the first field at fault."""
    if not isinstance(value, dict):
        raise invalid("expected a JSON object")
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None
    request.check()
    return request


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):  # names, not branches of a union
            param += f".{part}" if param else part
    message = first["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    return invalid(f"{param}: {message}" + (f" (and {more} more)" if more else ""), param)
