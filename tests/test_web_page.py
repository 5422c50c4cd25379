"""The chat page in a real browser: asking, stopping, what it says when something is wrong, who may ask it."""

import os
import re
import socket
import subprocess
import sys

import httpx
import pytest

from tests.web_fixtures import MARKS
from tests.web_visitor import BOX, CHAT, STATUS, Visitor

pytestmark = MARKS


def test_a_streamed_answer_with_its_speed_and_nothing_from_outside(visitor, service, served, pictures):
    visitor.picture("empty", pictures)
    service.delay = 0.15
    visitor.page.evaluate(f"""() => {{
        window.growing = new Set();
        const chat = document.querySelector("{CHAT}");
        new MutationObserver(() => growing.add(chat.innerText)).observe(chat, {{subtree: true, childList: true}});
    }}""")
    visitor.send("你好，世界，这一句要说得久一些")
    visitor.wait("次回答")
    visitor.picture("streaming", pictures)
    visitor.wait("首字", STATUS)
    assert visitor.page.evaluate("growing.size") > 5, "the answer came in pieces"
    visitor.ready()
    visitor.picture("answered", pictures)
    question, answer = visitor.bubbles()
    assert question == "你好，世界，这一句要说得久一些" and answer.endswith(f"回答：{question}。")
    assert visitor.page.inner_text(STATUS).startswith("321 个词元 · "), "the number the service counted"
    assert visitor.box() == ""
    assert service.keys[-1] == "Bearer a-key-for-tests"
    body = service.requests[-1]
    assert body["model"] == "tiny-baichuan" and body["stream"] and body["max_tokens"] == 1024
    assert "temperature" not in body, "the model's own sampling"
    assert "12356" in visitor.page.inner_text("#notice")
    service.delay = 0.001
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.settimeout(0.5)
        picture = f"http://127.0.0.1:{outside.getsockname()[1]}/x.png"
        visitor.ask(f'图片 ![x]({picture}) <img src="{picture}">')
        assert visitor.page.locator(f"{CHAT} img[src='{picture}']").count(), "the page has the picture's address"
        with pytest.raises(TimeoutError):
            outside.accept()
    visitor.ask('<script>window.run = 1</script><img src="x" onerror="window.run = 2"> [x](javascript:window.run=3)')
    assert visitor.page.evaluate("window.run") is None, "what a model writes is shown, not run"
    assert {url.split("/")[2] for url in visitor.asked if url.startswith("http")} == {served[0].split("/")[2]}


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("{}", None, 200),
        ("{}", "http://{}", 200),
        ("localhost:1", "http://localhost:17860", 200),  # the other end of a tunnel
        ("evil.example:17860", None, 403),  # a name of elsewhere that points here
        ("{}", "http://evil.example", 403),
        ("{}", "null", 403),
    ],
)
def test_only_this_machines_browser_is_answered(served, host, origin, status):
    """A page of elsewhere in the same browser would use the service with the page's key."""
    address = served[0].rstrip("/")
    headers = {"Host": host.format(address.removeprefix("http://"))}
    headers |= {"Origin": origin.format(headers["Host"])} if origin else {}
    for path in ("/", "/config"):
        assert httpx.get(address + path, headers=headers).status_code == status
    posted = httpx.post(f"{address}/gradio_api/upload", headers=headers, files={"files": b"x"})
    assert (posted.status_code == 403) == (status == 403)


def test_gradios_own_buttons_are_chinese_in_any_browser(browser, served, service):
    service.queue_full, service.delay = False, 0.001
    visitor = Visitor(browser, served[0], locale="en-US")
    visitor.ask("你好")
    buttons = visitor.page.locator(f"{CHAT} button[title]")
    titles = [buttons.nth(i).get_attribute("title") for i in range(buttons.count())]
    assert {"复制", "编辑", "重试", "撤销", "赞", "踩", "清空对话"} == set(titles)
    assert visitor.page.locator(".sidebar > .toggle-button").get_attribute("aria-label") == "对话记录"
    visitor.context.close()


def test_stop_reaches_the_service_and_what_was_said_stays(visitor, service, pictures):
    visitor.send("很长的回答，停止")
    visitor.wait("词词词")
    number = len(service.requests)
    visitor.send("提前写的")  # does not start a second answer
    visitor.page.wait_for_timeout(200)
    visitor.page.click("#question .stop-button")
    service.wait_until(lambda s: "很长的回答，停止" in s.closed)
    visitor.ready()
    visitor.wait("已停止", STATUS)
    assert len(service.requests) == number and visitor.box() == "提前写的"
    said = visitor.bubbles()[-1]
    assert set(said) == {"词"} and visitor.stored()[0]["messages"][-1]["content"] == said
    visitor.picture("stopped", pictures)
    visitor.ask("还在吗")
    assert [m["content"] for m in service.requests[-1]["messages"]] == ["很长的回答，停止", said, "还在吗"]


def test_a_closed_page_stops_the_engine(visitor, service):
    for question in ("很长，关闭", "排队，关闭"):
        visitor.send(question)
        service.wait_until(lambda s, q=question: any(r["messages"][-1]["content"] == q for r in s.requests))
        # Closed before the page hears of the answer, gradio may not notice it.
        visitor.page.locator(STATUS).get_by_text(re.compile("等待回答|词元")).wait_for()
        visitor.page.close()
        service.wait_until(lambda s, q=question: q in s.closed)
        visitor.page = visitor.open()
        # The question comes back, a new conversation empties the box: typed before that, the next one would be lost.
        visitor.page.wait_for_function(f"document.querySelector('{BOX}').value === '{question}'")
        visitor.page.click("#new")
        visitor.page.wait_for_function(f"document.querySelector('{BOX}').value === ''")
        visitor.page.locator(CHAT).get_by_text("我在听").wait_for()


def test_the_program_with_the_service_key_of_the_settings(browser, service, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "llm_code.web_framework.web_app",
        "--service_url",
        service.url,
        "--port",
        str(port),
    ]
    proxy = "http://127.0.0.1:9"  # nobody there
    variables = {**os.environ, "API_KEY": " first-key , second-key", "http_proxy": proxy, "HTTP_PROXY": proxy}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert f"The page is at http://127.0.0.1:{port}/" in process.stdout.readline()
        with pytest.raises(ConnectionRefusedError):  # 127.0.0.1 alone
            socket.create_connection(("127.0.0.2", port), timeout=5)
        someone = Visitor(browser, f"http://127.0.0.1:{port}/")
        someone.ask("你好")
        assert service.keys[-1] == "Bearer first-key"
        someone.send("很长，程序结束")
        someone.wait("词词")
        taken = subprocess.run(command, capture_output=True, text=True)
        assert taken.returncode == 2 and f"error: port {port} on 127.0.0.1 cannot be used" in taken.stderr
        process.terminate()
        assert process.wait(10) == 0
        service.wait_until(lambda s: "很长，程序结束" in s.closed)
        someone.context.close()
    finally:
        process.kill()


def test_a_full_queue_is_told_and_the_text_kept(visitor, service, pictures):
    visitor.ask("之前")
    service.queue_full = True
    visitor.send("现在很忙吗")
    visitor.wait("排队已满", "#refusal")
    visitor.ready()
    visitor.picture("queue_full", pictures)
    assert "7 秒后" in visitor.page.inner_text("#refusal")
    assert visitor.box() == "现在很忙吗" and len(visitor.bubbles()) == 2
    answer, asked = visitor.bubbles()[1], len(service.requests)
    visitor.press("重试")
    service.wait_until(lambda s: len(s.requests) > asked)
    visitor.page.wait_for_timeout(300)
    visitor.ready()
    assert visitor.bubbles() == ["之前", answer], "a refused retry keeps the old answer"
    service.queue_full = False
    visitor.page.press(BOX, "Enter")
    visitor.wait("回答：现在很忙吗。")
    visitor.page.locator("#refusal").wait_for(state="hidden")
    visitor.ready()
    assert visitor.stored()[0]["messages"][-1]["content"].endswith("现在很忙吗。")


def test_errors_are_told(visitor, service):
    visitor.send("坏请求")
    visitor.wait("temperature is wrong", "#refusal")
    visitor.ready()
    assert visitor.box() == "坏请求" and visitor.stored() == []
    visitor.send("中途出错的")
    visitor.wait("回答中断了：the computation failed", STATUS)
    visitor.ready()
    assert visitor.bubbles()[1].endswith("次回答：中途"), "what came before the error stays"
    visitor.ask("一")
    service.max_messages = 3
    visitor.ask("二")
    assert "最早的 1 轮没有发送" in visitor.page.inner_text(STATUS) and len(visitor.bubbles()) == 6
    assert [m["content"] for m in service.requests[-1]["messages"]][::2] == ["一", "二"]


def test_the_target_asks_the_service_of_the_settings(make):
    done = make("baichuan-web", "DRY_RUN=1", "BAICHUAN_PORT=1082", environment={"ENVS_DIR": "/envs"})
    expected = "--port 17860 --service_url http://127.0.0.1:1082/v1"
    assert done.stdout.strip().endswith(f"python -m llm_code.web_framework.web_app {expected}"), done.stderr


def test_enter_in_an_input_method_does_not_send(visitor, service):
    """The keys as Chromium sees them while pinyin becomes characters; then Safari's keyCode 229 behind them."""
    number, keys = len(service.requests), visitor.context.new_cdp_session(visitor.page)
    visitor.page.click(BOX)
    keys.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    for kind in ("rawKeyDown", "keyUp"):
        keys.send("Input.dispatchKeyEvent", {"type": kind, **enter})
    keys.send("Input.insertText", {"text": "nihao"})
    for options in ("isComposing: true", "keyCode: 229, which: 229"):
        for kind in ("keydown", "keypress"):
            event = f"new KeyboardEvent('{kind}', {{key: 'Enter', bubbles: true, cancelable: true, {options}}})"
            visitor.page.evaluate(f"document.querySelector('{BOX}').dispatchEvent({event})")
    visitor.page.wait_for_timeout(300)
    assert len(service.requests) == number and visitor.box() == "nihao"
    visitor.page.press(BOX, "Shift+Enter")
    visitor.page.keyboard.type("b")
    assert visitor.box() == "nihao\nb"
    visitor.page.press(BOX, "Enter")
    visitor.wait("回答：nihao")
    visitor.ready()


def test_the_phone_and_the_sampling(browser, served, service, pictures):
    service.delay = 0.02
    phone = Visitor(browser, served[0], viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    phone.page.locator(CHAT).get_by_text("睡不好").click()  # an example
    phone.wait("回答：最近总是睡不好")
    phone.ready()
    phone.picture("phone", pictures)
    width = phone.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 375, "nothing sticks out to the side"
    box = phone.page.locator("#question").bounding_box()
    assert box["y"] + box["height"] <= 740, "the input box is on the first screen"
    phone.page.click("#settings > button")
    phone.page.locator("#recommended input").uncheck()
    phone.picture("phone_settings", pictures)
    phone.ask("采样")
    assert (service.requests[-1]["temperature"], service.requests[-1]["top_p"]) == (0.3, 0.85)
    phone.page.locator(".toggle-button").click()
    phone.page.locator("#picker").get_by_text("最近总是睡不好").wait_for()
    phone.page.wait_for_timeout(500)
    phone.picture("phone_history", pictures)
    phone.context.close()
    assert not phone.errors
