"""What a person does with the chat page, and sees of it, by Playwright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.browser import until_texts


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")
    page.locator("#send.stop").wait_for()
    if wait:
        until_answered(page)


def until_answered(page: Any) -> None:
    page.locator("#send:not(.stop)").wait_for()
    page.locator('.answer[aria-busy="true"]').wait_for(state="detached")


def answers(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".answer > .prose").all_inner_texts()]


def questions(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".question .bubble").all_inner_texts()]


def until_titles(page: Any, titles: list[str]) -> None:
    until_texts(page.locator("#list .name"), titles)


def bring(page: Any, path: Path) -> None:
    """Imports a file of conversations."""
    page.locator("#open-settings").click()
    page.locator("#import-file").set_input_files(path)
    page.locator(".toast", has_text="imported").wait_for()


def reached_by_tab(page: Any) -> list[dict[str, str]]:
    """What has the focus after each Tab, once around the page."""
    found: list[dict[str, str]] = []
    page.locator("body").evaluate("() => document.activeElement.blur()")
    for _ in range(60):
        page.keyboard.press("Tab")
        place = page.evaluate(
            """() => { const it = document.activeElement; if (it === document.body) return null;
            const ring = [it, it.closest('.composer, .search')].filter(Boolean).map((one) => getComputedStyle(one));
            const seen = ring.some((one) => one.outlineStyle !== 'none') || it.closest('.composer') !== null;
            return {html: it.outerHTML.slice(0, 120), id: it.id, outline: seen ? 'there' : 'none'} }"""
        )
        if place is None:
            break
        found.append(place)
    assert {"new", "search", "open-settings", "question", "open-tune", "cluster-pill"} <= {one["id"] for one in found}
    return found


def file_of(texts: list[str]) -> dict[str, Any]:
    """A file of one conversation in which each text is asked and answered, and thought."""
    messages = [
        one
        for text in texts
        for one in (
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning": text, "state": "done"},
        )
    ]
    conversation = {"title": f"Imported {texts[0]}", "system": "", "messages": messages}
    return {"format": "tpimpi-conversations", "version": 1, "conversations": [conversation]}


# Of what is in an element: whatever loads or runs, attributes of events, and links with where they lead.
EXAMINE = """(root) => {
    const all = [...root.querySelectorAll("*")];
    const links = all.filter((one) => one.localName === "a");
    return {
        tags: all.map((one) => one.localName),
        events: all.flatMap((one) => one.getAttributeNames()).filter((name) => /^(on|style|srcdoc)/.test(name)),
        links: links.map((one) => [one.protocol, one.rel, one.target]),
    };
}"""
LOADS = {
    "img",
    "script",
    "iframe",
    "object",
    "embed",
    "link",
    "style",
    "meta",
    "base",
    "form",
    "audio",
    "video",
    "input",
}


def assert_harmless(found: dict[str, Any]) -> None:
    assert not LOADS & set(found["tags"])
    assert not found["events"]
    for protocol, rel, target in found["links"]:
        assert protocol in ("https:", "http:", "mailto:") and "noopener" in rel and target == "_blank"
