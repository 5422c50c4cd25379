"""HTTP by hand over a socket, for what no HTTP client would do."""

import json
import socket
import struct
import time


class Raw:
    """A connection to a service's port."""

    def __init__(self, port, timeout=10.0, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))
        self.buffer = b""

    def send(self, data):
        self.socket.sendall(data)
        return self

    def request(self, method="GET", path="/health", body=None, headers=()):
        """Send a request; a dict goes as JSON."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return self.send("\r\n".join([*lines, "", ""]).encode() + data)

    def chat(self, content, **fields):
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.request("POST", "/v1/chat/completions", body)

    def read_until(self, mark):
        """Everything up to and with the mark; what there is where the connection ends before."""
        while mark not in self.buffer:
            data = self.receive()
            if not data:
                data, self.buffer = self.buffer, b""
                return data
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(mark)
        return head + mark

    def receive(self):
        """Some bytes; none at the end, however it came."""
        try:
            return self.socket.recv(65536)
        except ConnectionError:
            return b""

    def response(self):
        """(status, headers, body) of a response with a Content-Length; status 0 when the connection just ended."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1")
        if not head:
            return 0, {}, b""
        first, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        while len(self.buffer) < length and (data := self.receive()):
            self.buffer += data
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(first.split()[1]), headers, body

    def wait_closed(self):
        """Read to the end of the connection; seconds that took."""
        started = time.monotonic()
        while self.receive():
            pass
        return time.monotonic() - started

    def close(self):
        self.socket.close()

    def reset(self):
        """Close with RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
