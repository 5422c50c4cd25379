"""Bring ports of a rented box to this computer over SSH, and keep them there; for your own computer.

    python3 scripts/tunnel.py            # make tunnel: open the tunnel, reconnect when it breaks
    python3 scripts/tunnel.py --print    # only show the command lines, also the one for Windows

From .env: TUNNEL_HOST (the box's login), TUNNEL_SSH_PORT and TUNNEL_PORTS. Nobody but this computer can use the ports:
they are bound to 127.0.0.1. A broken connection is opened again, by autossh where it is installed; with a key
(ssh-copy-id) instead of a password nobody has to be there.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import settings  # noqa: E402

LONGEST_PAUSE_SECONDS = 30
PAGE, SERVICE = 17860, 10820
START = {PAGE: "make baichuan-web BG=1", SERVICE: "make baichuan-serve BG=1"}
# A connection that died without a word is noticed after 45 seconds.
ALIVE = ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]


class TunnelError(ValueError):
    """A tunnel that cannot be opened, and what to do."""


def parse_ports(text: str) -> list[tuple[int, int]]:
    """(port here, port on the box) of "17860,18820:10820". Raises TunnelError."""
    pairs = []
    for part in text.split(","):
        here, _, there = part.partition(":")
        if not re.fullmatch(r"\d+(:\d+)?", part) or not all(0 < int(port) < 65536 for port in (here, there or here)):
            raise TunnelError(f"TUNNEL_PORTS: expected ports like 17860 or HERE:THERE like 8080:17860, got: {part}")
        pairs.append((int(here), int(there or here)))
    if len({here for here, _ in pairs}) < len(pairs):
        raise TunnelError(f"TUNNEL_PORTS names a port of this computer twice: {text}")
    return pairs


def ssh_arguments(host: str, port: str, pairs: list[tuple[int, int]]) -> list[str]:
    """What follows `ssh`: the walkthrough's flags without -g, which would let the whole network in."""
    if not re.fullmatch(r"([A-Za-z0-9_.]+@)?[A-Za-z0-9][A-Za-z0-9_.-]*", host):
        raise TunnelError(f"TUNNEL_HOST: expected USER@HOST like root@region.example.com, got: {host or '(empty)'}")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise TunnelError(f"TUNNEL_SSH_PORT: expected the box's SSH port like 22, got: {port}")
    forwards = [word for here, there in pairs for word in ("-L", f"127.0.0.1:{here}:127.0.0.1:{there}")]
    return ["-CN", *forwards, host, "-p", port]


def command_line(arguments: list[str]) -> list[str]:
    """autossh where it is installed, else ssh. It gives up when a port cannot be bound, rather than lack one."""
    program = ["autossh", "-M", "0"] if shutil.which("autossh") else ["ssh"]
    return [*program, *ALIVE, "-o", "ExitOnForwardFailure=yes", *arguments]


def check_free(pairs: list[tuple[int, int]]) -> None:
    """Raises TunnelError when something listens on this computer's side already."""
    for here, _ in pairs:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", here))
            except OSError as error:
                raise TunnelError(
                    f"port {here} of this computer cannot be used ({error.strerror}): another tunnel? See make status. "
                    f"Or choose another one: make tunnel TUNNEL_PORTS={here + 1}:{here}"
                ) from error


def keep_open(command: list[str], pairs: list[tuple[int, int]]) -> None:
    """Run the tunnel until it is ended from outside. Raises TunnelError when not even the first connection stands."""
    was_open, pause = False, 1
    while True:
        process = subprocess.Popen(command)
        try:
            if wait_until_open(process, pairs):
                announce(pairs)
                was_open, pause = True, 1
            status = process.wait()
        finally:
            process.terminate()
            process.wait()
        if not was_open:
            raise TunnelError(
                f"no connection ({command[0]} ended with status {status}, its words are above). TUNNEL_HOST and "
                "TUNNEL_SSH_PORT are in the login command on the box's page: ssh -p PORT USER@HOST"
            )
        say(f"the connection broke; again in {pause} s")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def wait_until_open(process: subprocess.Popen, pairs: list[tuple[int, int]]) -> bool:
    """Wait, for as long as someone may need to type a password, until ssh listens; False when it ended instead."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", pairs[0][0]), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False


def announce(pairs: list[tuple[int, int]]) -> None:
    for here, there in pairs:
        say(f"the tunnel is open: {address(here, there)}")
        if not answers(here):
            start = START.get(there, "its program")
            say(f"  but nothing listens on port {there} of the box yet. Start it there: {start}")


def address(here: int, there: int) -> str:
    return f"http://127.0.0.1:{here}{'/v1' if there == SERVICE else ''}"


def answers(here: int) -> bool:
    """Whether a connection stays: ssh closes it at once when the box refuses it."""
    try:
        with socket.create_connection(("127.0.0.1", here), timeout=2) as connection:
            return connection.recv(1) != b""
    except socket.timeout:  # a web server waits for the request
        return True
    except OSError:
        return False


def say(text: str) -> None:
    print(text, flush=True)


def show_lines(arguments: list[str], pairs: list[tuple[int, int]]) -> None:
    """The same by hand, and where the ports will be."""
    line = " ".join(map(shlex.quote, ["ssh", *arguments]))
    say(f"by hand, on Linux and macOS:           {line}")
    say(f"on Windows (Windows + R, then cmd):    {line}")
    say(f"then open:                             {' '.join(address(*pair) for pair in pairs)}")


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="only show the command lines")
    only_print = parser.parse_args().print
    try:
        settings.load()
        pairs = parse_ports(os.environ.get("TUNNEL_PORTS", ""))
        arguments = ssh_arguments(os.environ.get("TUNNEL_HOST", ""), os.environ.get("TUNNEL_SSH_PORT", ""), pairs)
        show_lines(arguments, pairs)
        if not only_print:
            check_free(pairs)
            signal.signal(signal.SIGTERM, stop)
            keep_open(command_line(arguments), pairs)
    except (TunnelError, settings.SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError:
        print("error: ssh is not installed (Debian, Ubuntu: apt-get install openssh-client)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("the tunnel is closed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
