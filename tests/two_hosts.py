"""Two machines that let each other in by ssh: network namespaces with an sshd in each, or two loopback addresses.

Both have this machine's file system. `machine_1` is the command that runs something on the first one.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIG = """
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
SSH = """#!/bin/sh
exec {ssh} -F none -p {port} -i {folder}/key -o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=no "$@"
"""


@dataclass(frozen=True)
class TwoHosts:
    """Addresses of both, what precedes a command on the first, variables that it needs."""

    addresses: tuple[str, str]
    machine_1: list[str]
    environment: dict[str, str]
    kind: str


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _make_namespaces(names: list[str], addresses: list[str]) -> None:
    for name in names:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    _ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire0", "netns", names[1])
    for name, address in zip(names, addresses, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "wire0")
        _ip("-n", name, "link", "set", "wire0", "up")


def _wait_for_port(prefix: list[str], address: str, port: int) -> None:
    code = f"import socket; socket.create_connection(({address!r}, {port}), 1)"
    deadline = time.monotonic() + 20
    while subprocess.run([*prefix, "python3", "-c", code], capture_output=True).returncode:
        assert time.monotonic() < deadline, f"no sshd at {address}:{port}"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _write_keys(folder: Path, port: int) -> None:
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(SSH.format(ssh=shutil.which("ssh"), port=port, folder=folder))
    (folder / "bin" / "ssh").chmod(0o755)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own condition when it runs as root


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Set both up, their keys and an `ssh` that uses them in folder/bin; take them down at the end."""
    port, mark = _free_port(), os.getpid()
    names, addresses = [f"host1-{mark}", f"host2-{mark}"], ["10.211.55.1", "10.211.55.2"]
    prefixes = [["ip", "netns", "exec", name] for name in names]
    variables = {"GLOO_SOCKET_IFNAME": "wire0"}
    try:
        _make_namespaces(names, addresses)
    except (OSError, subprocess.CalledProcessError):
        names, addresses, prefixes = [], ["127.0.0.1", "127.0.0.2"], [[], []]
        variables = {"GLOO_SOCKET_IFNAME": "lo"}
    _write_keys(folder, port)
    servers = []
    try:
        for prefix, address in zip(prefixes, addresses, strict=True):
            config = folder / f"sshd-{address}"
            config.write_text(CONFIG.format(address=address, port=port, folder=folder))
            servers.append(subprocess.Popen([*prefix, SSHD, "-D", "-f", config, "-E", folder / f"{address}.log"]))
            _wait_for_port(prefix, address, port)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        kind = "namespaces" if names else "loopback"
        yield TwoHosts((addresses[0], addresses[1]), prefixes[0], {**variables, "PATH": path}, kind)
    finally:
        for server in servers:
            server.terminate()
            server.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
