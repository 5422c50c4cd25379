"""The application: `create_app(load_engine, settings)`; the engine is loaded while the service answers already."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from llm_code.module_interface.interface import Engine
from llm_code.service.errors import ApiError
from llm_code.service.http import error_reply
from llm_code.service.lifecycle import Lifecycle
from llm_code.service.middleware import Keys, Limits, Observe, Options
from llm_code.service.routes import ROUTES
from llm_code.service.settings import ServiceSettings


def create_app(load_engine: Callable[[], Engine], settings: ServiceSettings) -> Starlette:
    """`load_engine` is called in a thread once the app starts; app.state.lifecycle knows how far it is."""
    lifecycle = Lifecycle(load_engine, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await lifecycle.start()
        yield
        await lifecycle.stop()

    layers = [Middleware(Observe, lifecycle=lifecycle), Middleware(Limits, settings=settings)]
    layers += [Middleware(Options, routes=ROUTES), Middleware(Keys, api_keys=settings.api_keys)]
    if settings.cors_origins:  # outermost, so that a page can read the errors too
        options = {"allow_origins": settings.cors_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        layers.insert(0, Middleware(CORSMiddleware, **options))
    app = Starlette(
        routes=ROUTES, middleware=layers, exception_handlers={HTTPException: _routing_error}, lifespan=lifespan
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body
    app.state.lifecycle = lifecycle
    return app


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{request.method[:20]} {request.url.path[:200]}: {error.detail}"
    return error_reply(ApiError(error.status_code, message, headers=error.headers))
