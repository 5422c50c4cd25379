"""The chat page in front of a service that answers slowly, refuses and breaks off, and a browser to look at it."""

import shutil
import socket
from pathlib import Path

import pytest

from tests.web_visitor import Visitor

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
MARKS = [
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore:.*:Warning:gradio.queueing"),  # of its own use of pandas
]


@pytest.fixture(scope="module")
def service():
    from tests.fake_service import FakeService

    with FakeService() as fake:
        yield fake


@pytest.fixture(scope="module")
def served(service, tmp_path_factory):
    """(address, feedback file) of the page."""
    from llm_code.web_framework.service import Service
    from llm_code.web_framework.web_app import build_page, launch

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    feedback = tmp_path_factory.mktemp("web") / "logs" / "feedback.jsonl"
    page = build_page(Service(service.url, "a-key-for-tests"), feedback)
    yield launch(page, port), feedback
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def visitor(browser, served, service):
    service.queue_full, service.max_messages, service.delay = False, 100, 0.02
    someone = Visitor(browser, served[0], viewport={"width": 1280, "height": 860})
    yield someone
    someone.context.close()
    assert not someone.errors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pictures")
