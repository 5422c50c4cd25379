"""The tunnel against a real sshd on loopback: opened, broken, opened again, closed; and its words."""

import getpass
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from scripts.tunnel import TunnelError, parse_ports, ssh_arguments
from tests.conftest import REPOSITORY

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
needs_sshd = pytest.mark.skipif(not SSHD or not shutil.which("ssh"), reason="openssh is not installed")
CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
# ssh finds keys and known hosts by the user's entry in /etc/passwd, so a test has to bring its own configuration.
HOSTS = "-o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=no"
SSH = f'#!/bin/sh\nexec {{ssh}} -F none -i {{folder}}/key {HOSTS} "$@"\n'


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_for(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write("心理咨询".encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A rented box: an sshd with a web page on another port. Yields (folder, port of sshd, port of the page)."""
    folder, port = tmp_path_factory.mktemp("box"), free_port()
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own condition when it runs as root
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "sshd_config").write_text(CONFIG.format(port=port, folder=folder))
    (folder / "ssh").write_text(SSH.format(ssh=shutil.which("ssh"), folder=folder))
    (folder / "ssh").chmod(0o755)
    sshd = subprocess.Popen([SSHD, "-D", "-f", folder / "sshd_config", "-E", folder / "sshd.log"])
    page = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, args=(0.05,), daemon=True).start()
    yield folder, port, page.server_port
    page.shutdown()
    page.server_close()
    sshd.terminate()
    sshd.wait()


class Tunnel:
    """scripts/tunnel.py as a person runs it, its words in a file."""

    def __init__(self, box, folder, there, autossh, here=None, ssh_port=None):
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "ssh").symlink_to(box[0] / "ssh")
        if autossh:
            (programs / "autossh").symlink_to(shutil.which("autossh"))
        self.here, self.words = here or free_port(), folder / "words"
        variables = {"PATH": str(programs), "AUTOSSH_PATH": str(box[0] / "ssh"), "TUNNEL_PORTS": f"{self.here}:{there}"}
        variables |= {"TUNNEL_HOST": f"{getpass.getuser()}@127.0.0.1", "TUNNEL_SSH_PORT": str(ssh_port or box[1])}
        with self.words.open("w") as file:
            command = [sys.executable, str(REPOSITORY / "scripts" / "tunnel.py")]
            self.process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)

    def said(self, text):
        return self.words.read_text().count(text)

    def get(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.here}/", timeout=10) as answer:
            return answer.read().decode()

    def children(self):
        found = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True).stdout.split("\n")
        rows = [row.split(None, 2) for row in found if row.strip()]
        below = {str(self.process.pid)}
        for pid, parent, _ in sorted(rows, key=lambda row: int(row[0])):
            if parent in below:
                below.add(pid)
        return {int(pid): name for pid, parent, name in rows if pid in below and pid != str(self.process.pid)}


@needs_sshd
@pytest.mark.parametrize("autossh", [False, True], ids=["ssh", "autossh"])
def test_the_tunnel_opens_reconnects_and_closes(box, tmp_path, autossh):
    if autossh and not shutil.which("autossh"):
        pytest.skip("autossh is not installed")
    tunnel = Tunnel(box, tmp_path, there=box[2], autossh=autossh)
    try:
        wait_for(lambda: tunnel.said("the tunnel is open"))
        assert tunnel.get() == "心理咨询"
        assert not tunnel.said("nothing listens")
        assert ("autossh" in tunnel.children().values()) == autossh
        with pytest.raises(ConnectionRefusedError):  # 127.0.0.1 alone, not every address of this computer
            socket.create_connection(("127.0.0.2", tunnel.here), timeout=5)

        [ssh] = [pid for pid, name in tunnel.children().items() if name == "ssh"]
        os.kill(ssh, signal.SIGKILL)
        wait_for(lambda: ssh not in tunnel.children() and "ssh" in tunnel.children().values())
        assert wait_for(lambda: page_through(tunnel)) == "心理咨询"

        left = tunnel.children()
        tunnel.process.terminate()
        assert tunnel.process.wait(10) == 0
        assert tunnel.said("the tunnel is closed")
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), 5)
    finally:
        tunnel.process.kill()


def page_through(tunnel):
    try:
        return tunnel.get()
    except OSError:
        return None


@needs_sshd
def test_what_is_missing_is_said(box, tmp_path):
    for folder in ("silent", "taken", "wrong"):
        (tmp_path / folder).mkdir()
    nothing = free_port()
    silent = Tunnel(box, tmp_path / "silent", there=nothing, autossh=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = Tunnel(box, tmp_path / "taken", box[2], autossh=False, here=server.getsockname()[1])
        assert taken.process.wait(20) == 2 and taken.said("cannot be used (Address already in use)")
    wrong = Tunnel(box, tmp_path / "wrong", box[2], autossh=False, ssh_port=free_port())
    assert wrong.process.wait(20) == 2 and wrong.said("error: no connection (ssh ended with status 255")
    try:
        wait_for(lambda: silent.said(f"nothing listens on port {nothing} of the box yet"))
    finally:
        silent.process.terminate()
    assert silent.process.wait(10) == 0


def test_the_lines_to_copy(make):
    given = ["TUNNEL_HOST=root@connect.example.com", "TUNNEL_SSH_PORT=23648"]
    done = make("tunnel", "ARGS=--print", *given)
    assert done.returncode == 0, done.stderr
    forwards = "-L 127.0.0.1:17860:127.0.0.1:17860 -L 127.0.0.1:10820:127.0.0.1:10820"
    line = f"ssh -CN {forwards} root@connect.example.com -p 23648"
    assert done.stdout.count(line) == 2 and "Windows" in done.stdout
    assert "http://127.0.0.1:17860 http://127.0.0.1:10820/v1" in done.stdout
    assert "tunnel needs TUNNEL_HOST" in make("tunnel").stderr


@pytest.mark.parametrize("ports", ["", "a", "0", "65536", "1:", "1:2:3", "17860,17860", "8080:1,8080:2", "-1"])
def test_bad_ports_are_refused(ports):
    with pytest.raises(TunnelError, match="TUNNEL_PORTS"):
        parse_ports(ports)


def test_ports_here_and_there():
    assert parse_ports("17860,8080:10820") == [(17860, 17860), (8080, 10820)]


@pytest.mark.parametrize(
    ("host", "port"), [("", "22"), ("-oProxyCommand=x", "22"), ("a b", "22"), ("h", "x"), ("h", "0")]
)
def test_a_bad_login_is_refused(host, port):
    with pytest.raises(TunnelError, match="TUNNEL_HOST|TUNNEL_SSH_PORT"):
        ssh_arguments(host, port, [(1, 1)])
