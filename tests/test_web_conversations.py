"""Conversations on the chat page in a real browser: retried, edited, stopped, kept, opened again, taken along."""

import json
from pathlib import Path

from tests.web_fixtures import MARKS
from tests.web_visitor import CHAT, STATUS

pytestmark = MARKS


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
