"""What the service is told at its start: address, keys, names, limits and clocks."""

import ipaddress
import os
import re
from dataclasses import dataclass

from finetune.errors import UserError

PORT = re.compile(r":\d+$")


@dataclass(frozen=True)
class ServiceSettings:
    """Defaults fit one machine behind an SSH tunnel; sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int = 10820  # 0: any free one
    api_keys: tuple[str, ...] = ()
    model_aliases: tuple[str, ...] = ()  # further names of the model
    any_model: bool = False  # accept whatever name a client sends
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    max_path_bytes: int = 4096
    max_connections: int = 4096
    default_max_tokens: int = 2048  # of an answer whose request names no limit, if the context leaves as much
    max_requests_per_key: int = 0  # running and waiting; 0: half of the batch where there are several keys
    request_seconds: float = 600.0  # from the request to its last token
    receipt_seconds: float = 15.0  # from a request's first byte to its last
    keep_alive_seconds: float = 30.0  # an idle connection stays open
    stall_seconds: float = 30.0  # a client reads nothing of its reply
    comment_seconds: float = 15.0  # a comment keeps a silent stream open
    drain_seconds: float = 60.0  # running requests may finish after SIGTERM
    linger_seconds: float = 1.0  # a service whose engine died shows it so long before it ends


def api_keys() -> tuple[str, ...]:
    """The keys in API_KEY: separated by commas, blanks around them are no part of them."""
    return tuple(key for part in os.environ.get("API_KEY", "").split(",") if (key := part.strip()))


def own_key() -> str | None:
    """The key that a client of the service sends: the first one, None where there is none."""
    return next(iter(api_keys()), None)


def check_address(settings: ServiceSettings) -> None:
    """Raise UserError for a port that is none, and for an address others can reach without a key."""
    if not 0 <= settings.port <= 65535:
        raise UserError(f"BAICHUAN_PORT: expected 0 to 65535, got {settings.port}.")
    if not settings.api_keys and not is_loopback(settings.host):
        raise UserError(
            f"listening on {settings.host} lets others in, which needs a key: set API_KEY in .env, "
            "or stay on 127.0.0.1 and come in through `make tunnel`."
        )
    for key in settings.api_keys:
        if len(key) < 8:
            raise UserError("API_KEY: expected at least 8 characters; make one with `openssl rand -hex 24`.")


def is_loopback(host: str) -> bool:
    """True for localhost and the addresses only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_this_machine(host: str) -> bool:
    """Whether a Host header names the loopback; a name of elsewhere that points here (DNS rebinding) does not."""
    return is_loopback(PORT.sub("", host).strip("[]"))
