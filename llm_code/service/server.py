"""Serve the model: OpenAI's protocol at /v1, the walkthrough's question at /internal/ask.

python -m llm_code.service.server --model_name_or_path DIR [--host 127.0.0.1] [--port 10820] [--max_batch 16]

Keys come from API_KEY in the environment, several separated by commas. Writes one line a request to stderr, never a
prompt or a key. SIGTERM lets running requests finish and exits 0; a second one ends it now. --engine vllm stands in
front of the server at --upstream_url or, without one, starts `vllm serve` in its own place.
"""

import argparse
import os
import shlex
import shutil
import sys
from functools import partial
from typing import NoReturn

from finetune.errors import UserError, run_main
from llm_code.module_interface.interface import Engine
from llm_code.module_interface.load import EngineSettings, add_engine_arguments, load_engine, settings_of
from llm_code.service.settings import ServiceSettings, api_keys, check_address


def parse_args() -> argparse.Namespace:
    defaults = ServiceSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    group = parser.add_argument_group("service")
    group.add_argument("--host", default=defaults.host, help="address to listen on; any but loopback needs API_KEY")
    group.add_argument("--port", type=int, default=defaults.port, help="0: any free one (default: %(default)s)")
    group.add_argument("--model_alias", action="append", default=[], help="a further name of the model; repeatable")
    group.add_argument("--any_model", action="store_true", help="accept whatever model name a client sends")
    group.add_argument("--cors_origin", action="append", default=[], help="a page that may call from a browser")
    group.add_argument("--request_seconds", type=float, default=defaults.request_seconds, help="limit of an answer")
    group.add_argument("--drain_seconds", type=float, default=defaults.drain_seconds, help="grace after SIGTERM")
    group.add_argument(
        "--max_requests_per_key", type=int, default=0, help="0: half of the batch where there are several keys"
    )
    return parser.parse_args()


def service_settings(args: argparse.Namespace) -> ServiceSettings:
    """The flags, and the keys from the environment. Raises UserError."""
    for name in ("request_seconds", "drain_seconds", "max_requests_per_key"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name}: expected 0 or more, got {getattr(args, name)}.")
    settings = ServiceSettings(
        host=args.host,
        port=args.port,
        api_keys=api_keys(),
        model_aliases=tuple(args.model_alias),
        any_model=args.any_model,
        cors_origins=tuple(args.cors_origin),
        request_seconds=args.request_seconds,
        drain_seconds=args.drain_seconds,
        max_requests_per_key=args.max_requests_per_key,
    )
    check_address(settings)
    return settings


def check_engine(settings: EngineSettings) -> None:
    """Raise UserError for what can be told without loading anything: a wrong model, adapter or number."""
    from finetune.identity import check_adapter
    from finetune.models import check_model_dir

    for name in ("max_batch", "context"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected 1 or more, got {value}.")
    if settings.max_queue < 0:
        raise UserError(f"--max_queue: expected 0 or more, got {settings.max_queue}.")
    if not settings.upstream_url:
        check_model_dir(settings.model_name_or_path)
        if settings.adapter_name_or_path:
            check_adapter(settings.adapter_name_or_path, settings.model_name_or_path)


def load_named(settings: EngineSettings) -> Engine:
    """The engine, with the fingerprint of its weights where they are in this process."""
    weights = None if settings.upstream_url else weights_fingerprint(settings)  # before the files can change
    engine = load_engine(settings)
    engine.weights_fingerprint = weights
    return engine


def weights_fingerprint(settings: EngineSettings) -> str:
    """Hex digest of the model, the adapter and the numbers' format. Reads little of each tensor."""
    from finetune.identity import adapter_fingerprint, fingerprint
    from finetune.partial_results import config_hash

    adapter = settings.adapter_name_or_path
    parts = {"model": fingerprint(settings.model_name_or_path), "adapter": adapter and adapter_fingerprint(adapter)}
    return config_hash(parts | {"load_in_4bit": settings.load_in_4bit, "dtype": settings.dtype})


def vllm_command(service: ServiceSettings, engine: EngineSettings) -> list[str]:
    """vLLM's own server on our address: the same protocol, without /internal/ask."""
    command = ["vllm", "serve", engine.model_name_or_path, "--host", service.host, "--port", str(service.port)]
    command += ["--served-model-name", engine.model_name, *service.model_aliases]
    values = {"--dtype": engine.dtype, "--max-model-len": engine.context, "--max-num-seqs": engine.max_batch}
    for flag, value in values.items():
        command += [flag, str(value)] if value is not None else []
    if engine.load_in_4bit:
        command += ["--quantization", "bitsandbytes"]
    if engine.adapter_name_or_path:
        command += ["--enable-lora", "--lora-modules", f"{engine.model_name}-adapter={engine.adapter_name_or_path}"]
    return command


def become_vllm(service: ServiceSettings, engine: EngineSettings) -> NoReturn:
    """Replace this process by `vllm serve`; the key goes by the environment, where no process list shows it."""
    if not shutil.which("vllm"):
        raise UserError(
            "ENGINE=vllm without UPSTREAM_URL starts `vllm serve`, and there is no vllm here: install it into llm_env "
            "(pip install vllm), or set UPSTREAM_URL to a server that runs."
        )
    if len(service.api_keys) > 1:
        raise UserError("vllm serve takes one key: expected one in API_KEY, found several.")
    if service.api_keys:
        os.environ["VLLM_API_KEY"] = service.api_keys[0]
    command = vllm_command(service, engine)
    print(f"-----> {shlex.join(command)}", file=sys.stderr, flush=True)
    os.execvp(command[0], command)


def main() -> int:
    args = parse_args()
    service, engine = service_settings(args), settings_of(args)
    check_engine(engine)
    if engine.engine == "vllm" and not engine.upstream_url:
        become_vllm(service, engine)
    from llm_code.service.process import serve  # after the checks: a mistake is told before anything is imported

    return serve(partial(load_named, engine), service)


if __name__ == "__main__":
    run_main(main)
