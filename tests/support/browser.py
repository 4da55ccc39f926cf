"""A real browser, Debian's Chromium without a window, which Playwright drives; and what it saw of a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 360, "height": 640}
PATIENCE_MS = 120_000  # on a machine that is busy with something else; no test waits for it to pass


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser. Skips the test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no {', '.join(NAMES)}; on Debian: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright; set up with: bash jobs/test.sh")
    with api.sync_playwright() as playwright:
        # Containers and root have no sandbox of Chromium's.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def until_texts(locator: Any, texts: list[str]) -> None:
    """Waits until the elements have these texts."""
    from playwright.sync_api import expect

    expect(locator).to_have_text(texts, timeout=PATIENCE_MS, use_inner_text=True)


@dataclass
class Seen:
    """What a page did that it must not do; see `watch`."""

    elsewhere: list[str] = field(default_factory=list)  # requests to another host
    errors: list[str] = field(default_factory=list)  # exceptions, and what the policy of the page forbade
    dialogs: list[str] = field(default_factory=list)


def watch(page: Any, address: str) -> Seen:
    """Notes from now on what the page does; `address` is its server's."""
    seen = Seen()

    def request(asked: Any) -> None:
        if not asked.url.startswith((address, "blob:", "data:")):
            seen.elsewhere.append(asked.url)

    def console(message: Any) -> None:
        if "Content Security Policy" in message.text or "Trusted" in message.text:
            seen.errors.append(message.text)

    def dialog(shown: Any) -> None:
        seen.dialogs.append(shown.message)
        shown.dismiss()

    page.on("request", request)
    page.on("console", console)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("dialog", dialog)
    return seen
