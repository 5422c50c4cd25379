"""The chat page in the browser, a client of the service's /v1. `make baichuan-web`.

    python -m llm_code.web_framework.web_app [--port 17860] [--service_url http://127.0.0.1:10820/v1]

Listens on 127.0.0.1 only: `make tunnel` is the way in from elsewhere. Loads nothing from other hosts. Writes liked and
disliked answers to --feedback_file; conversations stay in the browser. A service that asks for a key gets API_KEY.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from finetune.errors import UserError, run_main
from llm_code.module_interface.addresses import server_url
from llm_code.service.settings import own_key

HOST = "127.0.0.1"


def build_page(service: Any, feedback_file: Path) -> Any:
    """The page as gr.Blocks."""
    import gradio as gr

    from llm_code.web_framework import texts
    from llm_code.web_framework.events import Events
    from llm_code.web_framework.page import build_parts

    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, fill_height=True) as page:
        Events(build_parts(), service, feedback_file).connect(page)
    return page


def launch(page: Any, port: int) -> str:
    """Serve the page in a thread and return its address."""
    import gradio as gr
    from starlette.middleware import Middleware

    from llm_code.web_framework import texts
    from llm_code.web_framework.guard import Guard
    from llm_code.web_framework.page import HEAD, theme

    page.queue(default_concurrency_limit=None, api_open=False)
    _, url, _ = page.launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Guard)]},
        theme=theme(),
        head=HEAD,
        i18n=gr.I18n(**dict.fromkeys(("zh-CN", "zh-TW", "zh", "en"), texts.GRADIO)),
    )
    return url


def check_port(port: int) -> None:
    """Raises UserError when something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"port {port} on {HOST} cannot be used ({why}). Another page may be running: make status. "
                "Choose another one: make baichuan-web BAICHUAN_WEB_PORT=17861"
            ) from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=17860, help="where the page listens (default 17860)")
    parser.add_argument(
        "--service_url", type=server_url, default="http://127.0.0.1:10820/v1", help="the service, with /v1"
    )
    parser.add_argument("--feedback_file", type=Path, default=Path("logs/baichuan-web-feedback.jsonl"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_port(args.port)
    # Set before gradio is imported: no look-ups of versions, no reports.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    # Gradio asks its own address before it goes on: not by way of the proxy that rented boxes have for downloads.
    os.environ.update(NO_PROXY=HOST, no_proxy=HOST)
    from llm_code.web_framework.service import Service

    page = build_page(Service(args.service_url, own_key()), args.feedback_file)
    url, ended = launch(page, args.port), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    print(f"The page is at {url} and asks {args.service_url}. From elsewhere: make tunnel", flush=True)
    ended.wait()
    page.close(verbose=False)
    # Streams of open pages would keep the server's thread for as long as an answer takes.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run_main(main)
