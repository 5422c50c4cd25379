"""A person with a browser in front of the chat page, for its tests."""

import json

BOX, CHAT, STATUS = "#question textarea", "#chat", "#status"
PAUSE_MS = 1500


class Visitor:
    """A person with a browser of their own in front of the page."""

    def __init__(self, browser, url, **options):
        self.errors, self.asked = [], []
        self.url, self.context = url, browser.new_context(**{"locale": "zh-CN", "accept_downloads": True} | options)
        self.context.set_default_timeout(60_000)
        self.page = self.open()

    def open(self):
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfinished", lambda request: self.asked.append(request.url))
        page.goto(self.url)
        page.locator(STATUS).get_by_text("模型：tiny-baichuan").wait_for()
        return page

    def send(self, text):
        self.page.fill(BOX, text)
        self.page.press(BOX, "Enter")

    def ask(self, text):
        """Send and wait for the whole answer."""
        shown = len(self.bubbles())
        self.send(text)
        # The question and the beginning of its answer: the status line and the button may still be the last answer's.
        self.page.wait_for_function(f"document.querySelectorAll('{CHAT} .message').length > {shown + 1}")
        self.wait("首字", STATUS)
        self.ready()

    def set_system(self, text):
        """Open the settings, write, leave the field, with a person's pauses: the page draws meanwhile."""
        self.page.click("#settings > button")
        field = self.page.locator("#system textarea")
        field.wait_for()
        self.page.wait_for_timeout(PAUSE_MS)
        field.fill(text)
        field.press("Tab")
        self.page.wait_for_timeout(PAUSE_MS)

    def wait(self, text, where=CHAT):
        self.page.locator(where).get_by_text(text).first.wait_for()

    def ready(self):
        self.page.locator("#question .submit-button").wait_for()
        # the chain's last link has told the browser's storage
        self.page.wait_for_function("Object.keys(localStorage).every((k) => !localStorage[k].endsWith('user\"}]}'))")

    def bubbles(self):
        """[question, answer, ...] as shown."""
        return [text.strip() for text in self.page.locator(f"{CHAT} .message").all_inner_texts()]

    def press(self, title):
        self.page.locator(f'{CHAT} button[title="{title}"]').last.click()

    def box(self):
        return self.page.input_value(BOX)

    def stored(self):
        found = self.page.evaluate("Object.entries(localStorage).filter(([k]) => k.startsWith('baichuan-web/'))")
        return [json.loads(record) for _, record in found]

    def picture(self, name, folder):
        self.page.screenshot(path=folder / f"{name}.png")
