"""One engine from settings: flags of a program, or a dataclass in Python.

parser = argparse.ArgumentParser(); add_engine_arguments(parser)
engine = load_engine(settings_of(parser.parse_args()))
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from finetune.errors import UserError
from llm_code.module_interface.addresses import server_url
from llm_code.module_interface.interface import Engine, EngineDead

GIB = 1 << 30
ENGINES = ("local", "vllm")


@dataclass(frozen=True)
class EngineSettings:
    """Which engine, which model, and how much it takes on; None leaves the choice to the engine."""

    model_name_or_path: str
    engine: str = "local"
    adapter_name_or_path: str | None = None
    load_in_4bit: bool = False
    dtype: str | None = None
    served_model_name: str | None = None  # in replies; the folder's name
    upstream_url: str | None = None  # http://127.0.0.1:8000/v1
    upstream_api_key: str | None = None
    max_batch: int | None = None
    max_queue: int = 64
    context: int | None = None
    cache_gib: float | None = None
    queue_timeout: float | None = None

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model_name_or_path).resolve().name


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that uses an engine."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=ENGINES, default="local", help="this process, or a server at --upstream_url")
    group.add_argument("--model_name_or_path", required=True, help="folder of the model (tokenizer and weights)")
    group.add_argument("--adapter_name_or_path", help="folder of a LoRA adapter on that model")
    group.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (needs bitsandbytes)")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the device's best")
    group.add_argument("--served_model_name", help="name of the model in replies (default: the folder's)")
    group.add_argument(
        "--upstream_url", type=server_url, help="address of an OpenAI-compatible server, for example ...:8000/v1"
    )
    group.add_argument("--max_batch", type=int, help="requests computed at the same time (default: 8 on a CPU, 64)")
    group.add_argument("--max_queue", type=int, default=64, help="requests that may wait beyond those (default: 64)")
    group.add_argument("--context", type=int, help="tokens of prompt and answer together (default: the model's)")
    group.add_argument("--cache_gib", type=float, help="memory for keys and values (default: what the card has left)")
    group.add_argument("--queue_timeout", type=float, help="seconds a request may wait to start (default: no limit)")


def settings_of(args: argparse.Namespace) -> EngineSettings:
    """Parsed flags as settings; the upstream's key comes from the environment, where no process list shows it."""
    named = {field.name: getattr(args, field.name) for field in fields(EngineSettings) if hasattr(args, field.name)}
    return EngineSettings(**named, upstream_api_key=os.environ.get("UPSTREAM_API_KEY") or None)


def load_engine(settings: EngineSettings, on_death: Callable[[EngineDead], None] = lambda error: None) -> Engine:
    """The engine, ready to answer. `on_death` is called once if it ends with an error later.

    Raises UserError for settings that don't fit together and a model that cannot be loaded.
    """
    if settings.engine == "vllm":
        return _upstream_engine(settings)
    if settings.engine != "local":
        raise UserError(f"ENGINE must be {' or '.join(ENGINES)}, found {settings.engine!r}.")
    from finetune.models import load_for_inference
    from llm_code.module_interface.local_engine import LocalEngine, LocalOptions

    model, tokenizer = load_for_inference(
        settings.model_name_or_path, settings.adapter_name_or_path, settings.load_in_4bit, settings.dtype
    )
    options = LocalOptions(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        context=settings.context,
        cache_bytes=None if settings.cache_gib is None else int(settings.cache_gib * GIB),
        queue_timeout=settings.queue_timeout,
    )
    return LocalEngine(model, tokenizer, settings.model_name, options, on_death)


def _upstream_engine(settings: EngineSettings) -> Engine:
    if not settings.upstream_url:
        raise UserError("ENGINE=vllm needs UPSTREAM_URL, for example http://127.0.0.1:8000/v1.")
    from llm_code.module_interface.upstream import UpstreamEngine

    return UpstreamEngine(settings)
