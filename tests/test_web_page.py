"""The chat page in a real browser, in front of a small service that answers slowly, refuses and breaks off."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.web_visitor import BOX, CHAT, STATUS, Visitor

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore:.*:Warning:gradio.queueing"),  # of its own use of pandas
]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"


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


def test_stop_before_the_first_word_gives_the_question_back(visitor, service):
    visitor.send("排队一")
    visitor.wait("等待回答", STATUS)
    visitor.page.click("#question .stop-button")
    service.wait_until(lambda s: "排队一" in s.closed)
    visitor.ready()
    assert visitor.box() == "排队一" and visitor.bubbles() == [] and visitor.stored() == []


def test_a_stopped_edit_and_a_stopped_retry_give_the_conversation_back(visitor, service):
    visitor.ask("第一问")
    visitor.ask("第二问")
    before = visitor.bubbles()

    def stop_and_look(question):
        visitor.wait("等待回答", STATUS)
        visitor.page.click("#question .stop-button")
        service.wait_until(lambda s: question in s.closed)
        visitor.ready()
        service.wait_until(lambda _: visitor.bubbles() == before)
        assert [[m["content"] for m in record["messages"]] for record in visitor.stored()] == [before]

    visitor.page.locator(f'{CHAT} button[title="编辑"]').first.click()
    visitor.page.locator(f"{CHAT} textarea").fill("排队改")
    visitor.page.locator(f'{CHAT} button[title="发送"]').click()
    stop_and_look("排队改")
    assert visitor.box() == "排队改"
    service.delay = 60
    visitor.press("重试")
    stop_and_look("第二问")


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


def test_retry_edit_and_undo(visitor, service):
    visitor.ask("第一问")
    visitor.ask("第二问")
    before = visitor.bubbles()
    number = len(service.requests)  # before the click: the request may be there at once
    visitor.press("重试")
    visitor.wait(f"第{number + 1}次回答")
    visitor.wait("首字", STATUS)
    visitor.ready()
    assert visitor.bubbles()[:3] == before[:3] and visitor.bubbles()[3] != before[3]
    assert [m["content"] for m in service.requests[-1]["messages"]] == before[:3]

    visitor.page.locator(f'{CHAT} button[title="编辑"]').first.click()
    visitor.page.locator(f"{CHAT} textarea").fill("改过的第一问")
    visitor.page.locator(f'{CHAT} button[title="发送"]').click()
    visitor.wait(f"第{number + 2}次回答")
    visitor.wait("首字", STATUS)
    visitor.ready()
    assert visitor.bubbles() == ["改过的第一问", f"第{number + 2}次回答：改过的第一问。"]
    assert [m["content"] for m in visitor.stored()[0]["messages"]] == visitor.bubbles()

    visitor.press("撤销")
    service.wait_until(lambda _: visitor.box() == "改过的第一问" and visitor.bubbles() == [])


def test_an_emptied_question_comes_back(visitor, service):
    visitor.ask("第一问")
    visitor.ask("第二问")
    before, asked = visitor.bubbles(), len(service.requests)
    visitor.page.evaluate("""() => {
        const { save } = chats;
        chats.saved = 0;
        chats.save = (text) => { chats.saved += 1; return save(text); };
    }""")
    visitor.page.locator(f'{CHAT} button[title="编辑"]').first.click()
    visitor.page.locator(f"{CHAT} textarea").fill(" ")
    visitor.page.locator(f'{CHAT} button[title="发送"]').click()
    visitor.page.wait_for_function("chats.saved === 2")  # as after a question and after its answer
    service.wait_until(lambda _: visitor.bubbles() == before)  # the window draws all of them anew
    assert len(service.requests) == asked
    assert [[m["content"] for m in record["messages"]] for record in visitor.stored()] == [before]


def test_conversations_outlive_reload_and_switch(visitor, service, pictures):
    visitor.set_system("你是医生")
    visitor.ask("甲问题")
    assert service.requests[-1]["messages"][0] == {"role": "system", "content": "你是医生"}
    visitor.page.click("#new")
    visitor.page.locator(CHAT).get_by_text("我在听").wait_for()
    visitor.ask("乙问题")
    assert [m["role"] for m in service.requests[-1]["messages"]] == ["user"]
    visitor.page.reload()
    visitor.wait("回答：乙问题。")
    visitor.picture("history", pictures)
    visitor.page.locator("#picker").get_by_text("甲问题").click()
    visitor.wait("回答：甲问题。")
    visitor.page.click("#settings > button")
    assert visitor.page.input_value("#system textarea") == "你是医生"
    visitor.ask("再问甲")
    assert len(visitor.bubbles()) == 4 and len(visitor.stored()) == 2
    visitor.page.click("#delete")
    visitor.page.locator(CHAT).get_by_text("我在听").wait_for()
    assert [record["title"] for record in visitor.stored()] == ["乙问题"]
    assert visitor.page.locator("#picker").inner_text().split() == ["对话记录", "乙问题"]


def test_a_reload_in_the_middle_gives_the_question_back(visitor, service):
    visitor.send("很长，重新加载")
    visitor.wait("词词")
    visitor.page.reload()
    service.wait_until(lambda s: "很长，重新加载" in s.closed)
    visitor.page.wait_for_function("document.querySelector('#question textarea')?.value")
    assert visitor.box() == "很长，重新加载"


def test_two_tabs_and_a_full_storage(visitor):
    """Each tab keeps its own conversation; the oldest ones make room for the newest."""
    visitor.ask("标签一")
    first, visitor.page = visitor.page, visitor.open()
    visitor.page.click("#new")
    visitor.page.locator(CHAT).get_by_text("我在听").wait_for()
    visitor.ask("标签二")
    visitor.page, second = first, visitor.page
    visitor.ask("标签一的第二问")
    assert {r["title"]: len(r["messages"]) for r in visitor.stored()} == {"标签一": 4, "标签二": 2}
    second.reload()
    second.locator(CHAT).get_by_text("回答：标签二。").wait_for()
    big = "{id: String(n), title: 'big', time: n, system: '', messages: [{role: 'user', content: 'x'.repeat(1e6)}]}"
    visitor.page.evaluate(f"for (let n = 1; n < 9; n++) window.chats.save(JSON.stringify({big}))")
    kept = [record["id"] for record in visitor.stored()]
    assert "8" in kept and "1" not in kept and len(kept) >= 5


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


def test_export_and_feedback(visitor, served):
    visitor.ask("写一句 # 诗")
    question, answer = visitor.bubbles()
    visitor.press("赞")
    visitor.wait("已记录", "body")
    line = json.loads(served[1].read_text(encoding="utf-8").splitlines()[-1])
    assert line["verdict"] == "like" and [m["content"] for m in line["messages"]] == [question, answer]
    for button, check in (("#markdown", check_markdown), ("#json", check_json)):
        with visitor.page.expect_download() as download:
            visitor.page.click(button)
        check(download.value.suggested_filename, Path(download.value.path()).read_text("utf-8"), question, answer)


def check_markdown(name, text, question, answer):
    assert name == "写一句 # 诗.md" and text.startswith("# 写一句 # 诗\n")
    assert text.endswith(f"**用户**\n\n{question}\n\n**模型**\n\n{answer}\n")


def check_json(name, text, question, answer):
    assert name == "写一句 # 诗.json"
    told = [("user", question), ("assistant", answer)]
    assert [(m["role"], m["content"]) for m in json.loads(text)["messages"]] == told


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
