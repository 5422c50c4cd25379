"""The process of the service: its socket, its signals, its exit status.

The first SIGTERM, SIGINT or SIGHUP drains (/ready is 503 at once, running requests finish, the status is 0), the
second ends the process now.
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from finetune.errors import UserError
from llm_code.module_interface.interface import Engine
from llm_code.service.app import create_app
from llm_code.service.connections import connection_class
from llm_code.service.logs import set_up_logging
from llm_code.service.settings import ServiceSettings, check_address

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one: the terminal is gone
CLOSING_SECONDS = 5  # for replies that are complete to reach their readers
ENGINE_LOST = 3
log = logging.getLogger(__name__)


def serve(load_engine: Callable[[], Engine], settings: ServiceSettings) -> int:
    """Serve until a signal or the loss of the engine; returns the exit status. Raises UserError before it listens."""
    check_address(settings)
    listener = listen(settings.host, settings.port)
    set_up_logging()
    _allow_files(settings.max_connections)
    server = ServiceServer(load_engine, settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d (OpenAI's protocol at /v1); loading the model", shown, port)
    server.run(sockets=[listener])
    status = server.status
    loader = server.lifecycle.loader
    if status or (loader is not None and loader.is_alive()):
        leave(status)  # nothing can interrupt a thread that is loading a model, or is stuck
    return status


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError where the address is taken or is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named for asyncio, which else leaves Nagle's algorithm on: 40 ms between header and body.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use: another service runs there (make status), "
                "or name another port with BAICHUAN_PORT."
            ) from None
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}.") from None
    listener.set_inheritable(False)
    return listener


def leave(status: int) -> None:
    """End the process now, without waiting for any thread."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _allow_files(connections: int) -> None:
    """Raise the soft limit of open files so far that the connections fit; what is not allowed stays as it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256 if hard == resource.RLIM_INFINITY else min(connections + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class ServiceServer(uvicorn.Server):
    """uvicorn with our connections, a drain before its end, and exit statuses that tell how it ended."""

    def __init__(self, load_engine: Callable[[], Engine], settings: ServiceSettings) -> None:
        app = create_app(load_engine, settings)
        self.settings, self.lifecycle = settings, app.state.lifecycle
        self.lifecycle.on_failure = self._engine_lost
        self.status, self._stopping = 0, False
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(settings, self._refused),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=1024,
                timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=CLOSING_SECONDS,
                h11_max_incomplete_event_size=settings.max_header_bytes,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, which would turn a clean exit into a death by signal."""
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stopping:
            leave(128 + sig)
        self._stopping = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain_task = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        drain = asyncio.ensure_future(self.lifecycle.drain())
        await asyncio.wait([drain], timeout=self.settings.drain_seconds + CLOSING_SECONDS)
        if not drain.done():
            log.error("the engine did not end in time")
            leave(1)
        self.should_exit = True

    def _engine_lost(self, error: BaseException | None) -> None:
        """A load that failed ends the process at once; a death shows itself at /health for a moment first."""
        self.status = ENGINE_LOST
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            self.status = 2
        elif error is not None:
            traceback.print_exception(error)
            self.status = 1
        wait = 0.0 if error is not None else self.settings.linger_seconds
        self._loop.call_later(wait, setattr, self, "should_exit", True)

    def _refused(self, reason: str, status: int | None) -> None:
        metrics = self.lifecycle.metrics
        metrics.rejected.add(1, reason=reason)
        if status is not None:
            metrics.requests.add(1, path="other", status=str(status))
