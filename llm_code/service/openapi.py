"""/openapi.json: the requests and replies of the service, made from the models that check and write them."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from llm_code.service import protocol, replies

REFERENCE = "#/components/schemas/{model}"
REQUESTS = (protocol.ChatCompletionRequest, protocol.CompletionRequest, protocol.AskRequest)
REPLIES = (
    replies.ChatCompletion,
    replies.ChatCompletionChunk,
    replies.Completion,
    replies.ModelList,
    replies.ModelCard,
    replies.AskReply,
    replies.Health,
    replies.ErrorReply,
)
FAULTS = {
    400: "the request is at fault; param names the field",
    401: "no valid key",
    403: "a Host that is not this machine's, where no key is set; a page of another site",
    404: "no such model",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "busy; Retry-After says when to come again",
    500: "the service failed on this request",
    502: "the upstream server failed",
    503: "loading, shutting down, or waited too long",
    504: "not finished in time",
}


@cache
def document() -> dict[str, Any]:
    kinds = [(kind, "validation") for kind in REQUESTS] + [(kind, "serialization") for kind in REPLIES]
    _, definitions = models_json_schema(kinds, ref_template=REFERENCE)
    keys = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llm_code service", "version": "1", "description": "OpenAI's protocol over one model."},
        "paths": _paths(),
        "components": {"schemas": definitions["$defs"], "securitySchemes": {"key": keys}},
    }


def _paths() -> dict[str, Any]:
    limits = {"query": {"minLength": 1}, "apiType": {"enum": ["ask"]}}
    fields = protocol.AskRequest.model_fields
    query = [_parameter(name, "query", name == "query", **limits.get(name, {})) for name in fields]
    return {
        "/v1/chat/completions": {
            "post": _operation("ChatCompletion", "ChatCompletionRequest", stream="ChatCompletionChunk")
        },
        "/v1/completions": {"post": _operation("Completion", "CompletionRequest", stream="Completion")},
        "/v1/models": {"get": _operation("ModelList", faults=(401, 403, 503))},
        "/v1/models/{name}": {
            "get": {
                **_operation("ModelCard", faults=(401, 403, 404, 503)),
                "parameters": [_parameter("name", "path", True)],
            }
        },
        "/internal/ask": {
            "post": _operation("AskReply", "AskRequest"),
            "get": {**_operation("AskReply"), "parameters": query},
        },
        "/health": {"get": _state({503: "the engine is lost"})},
        "/ready": {"get": _state({503: "loading, draining or lost"})},
        "/metrics": {"get": _text("text/plain", "Prometheus' text format")},
        "/openapi.json": {"get": _text("application/json", "this document")},
    }


def _operation(
    reply: str, request: str | None = None, *, stream: str | None = None, faults: tuple[int, ...] = tuple(FAULTS)
) -> dict[str, Any]:
    content = {"application/json": _schema(reply)}
    if stream:
        content["text/event-stream"] = {
            **_schema(stream),
            "description": "with stream: true; each event is `data: ` and this object, the last one `data: [DONE]`",
        }
    responses = {"200": {"description": "the reply", "content": content}}
    for status in faults:
        error = {"application/json": _schema("ErrorReply")}
        responses[str(status)] = {"description": FAULTS[status], "content": error}
    operation: dict[str, Any] = {"responses": responses, "security": [{"key": []}, {}]}
    if request:
        operation["requestBody"] = {"required": True, "content": {"application/json": _schema(request)}}
    return operation


def _state(other: dict[int, str]) -> dict[str, Any]:
    descriptions = {200: "well", **other}
    content = {"application/json": _schema("Health")}
    return {"responses": {str(s): {"description": text, "content": content} for s, text in descriptions.items()}}


def _text(media_type: str, description: str) -> dict[str, Any]:
    return {
        "responses": {"200": {"description": description, "content": {media_type: {}}}},
        "security": [{"key": []}, {}],
    }


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": REFERENCE.format(model=name)}}


def _parameter(name: str, place: str, required: bool, **limits: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": {"type": "string", **limits}}
