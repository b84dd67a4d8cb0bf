"""A page in a real browser, and what went wrong on it."""

import shutil

import pytest
from playwright.sync_api import expect

expect.set_options(timeout=60_000)  # a machine that does much else draws slowly

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Visit:
    """A page with a list of what went wrong on it."""

    def __init__(self, browser, served, path="/", **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        self.page, self.wrong, self.served = self.context.new_page(), [], served
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.wrong.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self.check_host)
        self.page.goto(served.url + path)
        if path == "/":
            self.page.wait_for_selector("html[data-ready]")
            expect(self.page.locator("#colours [data-said]")).not_to_be_empty()
            expect(self.page.locator("#network .best")).to_have_count(1)

    def hear(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def check_host(self, request):
        if not request.url.startswith((self.served.url, "data:", "blob:")):
            self.wrong.append(f"request to {request.url}")

    def close(self):
        self.context.close()
        assert self.wrong == []


def slide(page, label, value):
    """Move a slider as its own events would."""
    page.get_by_label(label, exact=True).evaluate(
        "(one, value) => { one.value = value; one.dispatchEvent(new Event('input', {bubbles: true})) }", value
    )


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not driven")
