"""The service as a process of its own, over the scripted engine, for tests of sockets, signals and memory.

python -m tests.service_process '{"port": 0}' '{"max_batch": 4}'    # ServiceSettings, FakeEngine
"""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parent.parent
MEMORY = 4 << 30  # bytes of address space: hostile input must not get more


class ServiceProcess:
    """Started, its port known from its log; ready unless `wait` is False. `http` talks to it."""

    def __init__(self, log_path, settings=None, engine=None, wait=True, command=None):
        self.log_path = Path(log_path)
        settings = {"port": 0, "keep_alive_seconds": 60, **(settings or {})}
        module = [sys.executable, "-m", "tests.service_process"]
        command = command or [*module, json.dumps(settings), json.dumps(engine or {})]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=log, stdout=log, stdin=subprocess.DEVNULL)
        self.port = int(self.wait_for(r"listening on http://[^ ]*:(\d+) ")[1])
        key = {"Authorization": f"Bearer {settings['api_keys'][0]}"} if settings.get("api_keys") else {}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=key, timeout=30, trust_env=False)
        if wait:
            self.wait_for(r"ready: ")

    def log(self):
        return self.log_path.read_text(encoding="utf-8")

    def wait_for(self, expression, seconds=30):
        """The match in the log, once it is there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if match := re.search(expression, self.log()):
                return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {expression!r} in the log:\n{self.log()}")

    def chat(self, content, **fields):
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def metric(self, name):
        """A metric's value, summed over labels whose text contains what follows the name in the argument."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def send_signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def stop(self):
        """End it; the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def until(condition, seconds=10):
    """Wait for a condition of another process or thread; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value


def main():
    from llm_code.service.process import serve
    from llm_code.service.settings import ServiceSettings
    from tests.fake_engine import FakeEngine

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    settings, engine = (json.loads(argument) for argument in sys.argv[1:])
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return serve(lambda: FakeEngine(**engine), ServiceSettings(**settings))


if __name__ == "__main__":
    from finetune.errors import run_main

    run_main(main)
