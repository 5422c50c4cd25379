"""The addresses of the service: HTTP in, HTTP out, nothing else."""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llm_code.service.errors import ApiError
from llm_code.service.http import EventStream, json_reply, read_json, unless_gone
from llm_code.service.lifecycle import FAILED, READY, Lifecycle
from llm_code.service.openapi import document
from llm_code.service.protocol import AskRequest, ChatCompletionRequest, CompletionRequest, validated
from llm_code.service.replies import Health


async def chat_completions(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    serving = lifecycle.ready()
    body = validated(ChatCompletionRequest, await read_json(request, lifecycle.settings.max_body_bytes))
    run = serving.chat(body, request.state.key)
    if body.stream:
        return EventStream(run.chunks(), lifecycle.settings.comment_seconds)
    return json_reply(await unless_gone(request.receive, run.reply()))


async def completions(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    serving = lifecycle.ready()
    body = validated(CompletionRequest, await read_json(request, lifecycle.settings.max_body_bytes))
    run = serving.completion(body, request.state.key)
    if body.stream:
        return EventStream(run.chunks(), lifecycle.settings.comment_seconds)
    return json_reply(await unless_gone(request.receive, run.reply()))


async def ask(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    serving = lifecycle.ready()
    if request.method == "POST":
        value = await read_json(request, lifecycle.settings.max_body_bytes)
    else:
        _refuse_other_sites(request, lifecycle.settings.cors_origins)
        value = dict(request.query_params)
    body = validated(AskRequest, value)
    return json_reply(await unless_gone(request.receive, serving.ask(body, request.state.key)))


async def models(request: Request) -> Response:
    return json_reply(_lifecycle(request).ready().models())


async def model(request: Request) -> Response:
    return json_reply(_lifecycle(request).ready().model(request.path_params["name"]))


async def health(request: Request) -> Response:
    """Alive: the process answers and its engine is not lost."""
    state = _lifecycle(request).look()
    return json_reply(Health(status=state), 503 if state == FAILED else 200)


async def ready(request: Request) -> Response:
    """Ready: a request sent now would be served."""
    state = _lifecycle(request).look()
    response = json_reply(Health(status=state), 200 if state == READY else 503)
    if state != READY:
        response.headers["Retry-After"] = "5"
    return response


async def metrics(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    stats = lifecycle.serving.engine.stats() if lifecycle.serving else None
    text = lifecycle.metrics.render(stats, lifecycle.state)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request) -> Response:
    return JSONResponse(document())


def _refuse_other_sites(request: Request, allowed: tuple[str, ...]) -> None:
    """Raise ApiError 403 where a page of elsewhere has its browser ask, as an image's address can: it need not be able
    to read the answer to have it computed. A POST is kept from such a page by its content type."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site in ("cross-site", "same-site") and origin not in allowed:
        raise ApiError(403, "pages of other sites may not ask", code="other_site")


def _lifecycle(request: Request) -> Lifecycle:
    return request.app.state.lifecycle


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/internal/ask", ask, methods=["GET", "POST"]),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]
