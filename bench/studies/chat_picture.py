"""The picture of the chat page in README: a real conversation with SmolLM2 on an emulated home of three devices.

    python -m bench.home run -n 3 --latency 0.2ms -- python -m bench.studies.chat_picture docs/chat.png

Linux, as root, with Debian's chromium. Every rank becomes `tpimpi serve`; on the device of rank 0 a browser asks it, makes
the picture while the last answer comes, and ends the server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

PORT = 8080
URL = f"http://127.0.0.1:{PORT}"
SIZE = ViewportSize(width=1200, height=800)
BEFORE = ["Why is the sky blue?", "Give three tips for sleeping better."]  # in conversations of their own
QUESTIONS = ["Write a Python function that computes the factorial of a number, with an example."]
LAST = "Give three tips for writing good tests."
SEEN_WORDS = 30  # of the last answer, before the picture is made
PATIENCE_S = 300


def main() -> None:
    """A rank's program; on rank 0 beside it the browser."""
    picture, *told = sys.argv[1:]
    if told:
        browse(Path(picture), int(told[0]))
        return
    if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "0":
        subprocess.Popen([sys.executable, "-m", "bench.studies.chat_picture", picture, str(os.getpid())])
    os.execv(sys.executable, [sys.executable, "-m", "tpimpi", "serve", "--quiet", "--port", str(PORT)])


def browse(picture: Path, server: int) -> None:
    """Has the conversations, and ends the process `server`."""
    try:
        until_ready()
        with sync_playwright() as playwright:
            program = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_context(viewport=SIZE, device_scale_factor=1).new_page()
            page.set_default_timeout(PATIENCE_S * 1000)
            page.goto(URL)
            converse(page)
            page.screenshot(path=picture)
            browser.close()
    finally:
        os.kill(server, signal.SIGTERM)


def converse(page: Page) -> None:
    page.evaluate(
        "localStorage['tpimpi.defaults'] = JSON.stringify({system: '', sampling: {temperature: 0, max_tokens: 200}})"
    )
    page.reload()
    for question in BEFORE:
        ask(page, question)
        page.locator("#new").click()
    for question in QUESTIONS:
        ask(page, question)
    ask(page, LAST, wait=False)
    words = "document.querySelector('.answer:last-child > .prose').textContent.split(' ').length"
    while page.evaluate(words) < SEEN_WORDS:
        time.sleep(0.05)
    page.mouse.move(0, 0)


def ask(page: Page, question: str, *, wait: bool = True) -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    page.locator("#send.stop").wait_for()
    if wait:
        page.locator("#send:not(.stop)").wait_for()


def until_ready() -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{URL}/health").close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(f"no server at {URL} within {PATIENCE_S} s")


if __name__ == "__main__":
    main()
