"""The engine's life inside the service: loading beside the event loop, ready, draining, failed."""

import asyncio
import logging
import threading
from collections.abc import Callable

from llm_code.module_interface.interface import Engine
from llm_code.service.errors import engine_dead, loading, shutting_down
from llm_code.service.metrics import Metrics
from llm_code.service.serving import Serving
from llm_code.service.settings import ServiceSettings

LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"
WATCH_SECONDS = 0.2
log = logging.getLogger(__name__)


class Lifecycle:
    """`on_failure` is told when the engine could not be loaded or has died; the program decides what follows."""

    def __init__(self, load_engine: Callable[[], Engine], settings: ServiceSettings) -> None:
        self.load_engine, self.settings = load_engine, settings
        self.metrics = Metrics()
        self.state, self.error = LOADING, None
        self.serving: Serving | None = None
        self.on_failure: Callable[[BaseException | None], None] = lambda error: None
        self.loader: threading.Thread | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to load, in a thread that does not keep the process alive."""
        loop = asyncio.get_running_loop()
        self.loader = threading.Thread(target=self._load, args=(loop,), name="load-engine", daemon=True)
        self.loader.start()

    def look(self) -> str:
        """The state, after a look at the engine."""
        if self.state == READY and self.serving is not None and not self.serving.engine.stats().alive:
            log.error("the engine has stopped")
            self.fail()
        return self.state

    def ready(self) -> Serving:
        """What serves requests. Raises ApiError 503 while there is nothing, or nothing new is accepted."""
        self.look()
        if self.state == LOADING:
            raise loading()
        if self.state == DRAINING:
            raise shutting_down()
        if self.state == FAILED or self.serving is None:
            raise engine_dead()
        return self.serving

    async def drain(self) -> None:
        """Accept nothing new, let what runs finish within the limit, end what waits."""
        if self.state == READY:
            log.info("draining: running requests may finish within %g s", self.settings.drain_seconds)
        self.state = DRAINING
        if self.serving is not None:
            await asyncio.to_thread(self.serving.engine.close, self.settings.drain_seconds)

    async def stop(self) -> None:
        """Close what is still open."""
        if self._watch is not None:
            self._watch.cancel()
        if self.serving is not None and self.state != FAILED:  # a lost engine's thread may never answer
            await asyncio.to_thread(self.serving.close)

    def fail(self, error: BaseException | None = None) -> None:
        """The engine is lost. Harmless when that is known."""
        if self.state not in (FAILED, DRAINING):
            self.state, self.error = FAILED, error
            if self.serving is not None:
                self.serving.fail(engine_dead())
            self.on_failure(error)

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        engine: Engine | None = None
        error: BaseException | None = None
        try:
            engine = self.load_engine()
        except BaseException as caught:  # told to the event loop, which decides
            error = caught
        try:
            loop.call_soon_threadsafe(self._loaded, engine, error)
        except RuntimeError:
            pass  # the service has ended in the meantime

    def _loaded(self, engine: Engine | None, error: BaseException | None) -> None:
        if engine is None:
            self.fail(error)
        elif self.state == LOADING:
            self.serving = Serving(engine, self.settings, self.metrics)
            self.state = READY
            self._watch = asyncio.get_running_loop().create_task(self._watch_engine())
            log.info("ready: %s, context %d tokens", engine.model_name, engine.limits.context)

    async def _watch_engine(self) -> None:
        while self.look() == READY:
            await asyncio.sleep(WATCH_SECONDS)
