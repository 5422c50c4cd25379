"""Addresses of servers, as they come from a command line or a setting."""

import argparse
from urllib.parse import urlsplit


def server_url(text: str) -> str:
    """The address, as an argparse type. Raises ArgumentTypeError for one that no request could be sent to."""
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return text
        found = text
    except ValueError as error:  # a port that is no number or too large
        found = f"{text} ({error})"
    raise argparse.ArgumentTypeError(f"expected an address like http://127.0.0.1:10820, got {found}")
