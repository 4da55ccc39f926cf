"""The chat page, in a real browser, from a real server that answers by SmolLM2 on two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import NARROW, PATIENCE_MS, WIDE, Seen, chromium, watch
from tests.support.chat_page import (
    EXAMINE,
    answers,
    ask,
    assert_harmless,
    bring,
    file_of,
    questions,
    reached_by_tab,
    until_answered,
    until_titles,
)
from tests.support.hostile_answers import ELSEWHERE, HOSTILE
from tests.support.launch import Launcher
from tests.support.servers import RunningServer

pytestmark = [pytest.mark.any_mpi]

KEY = "a-key-of-the-tests"
GREEDY = {"temperature": 0, "top_p": None, "max_tokens": 40, "seed": None}
QUESTION = "What is the capital of France?"
OTHER = "Name three animals of the sea."
STORY = "Write a very long story about a lighthouse."  # of which SmolLM2 finds no end
STORY_TOKENS = 7000

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def server(
    mpirun: Launcher, smollm2: Path, cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys").write_text(f"{KEY}\n")
    options = ("--model", str(smollm2), "--api-key-file", str(folder / "keys"))
    running = RunningServer(mpirun, 2, folder / "log", *options, env=cache)
    running.until_ready()
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(server: RunningServer, browser: Any) -> Iterator[Open]:
    """Opens the page as somebody would for the first time, but with the key and greedy sampling; checks at the end that it
    asked no other host for anything, and that nothing in it went wrong."""
    opened: list[tuple[Any, Seen]] = []

    def open_(*, viewport: dict[str, int] = WIDE, key: str = KEY, sampling: dict[str, Any] | None = None) -> Any:
        context = browser.new_context(viewport=viewport, accept_downloads=True)
        defaults = json.dumps({"system": "", "sampling": {**GREEDY, **(sampling or {})}})
        kept = {"tpimpi.key": key, "tpimpi.defaults": defaults}
        context.add_init_script(
            f"for (const [name, value] of Object.entries({json.dumps(kept)})) localStorage[name] ??= value;"
        )
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        opened.append((context, watch(page, server.url)))
        page.goto(server.url)
        page.locator("#question:focus, #key[open]" if viewport is WIDE else "#question").first.wait_for()
        return page

    yield open_
    for context, seen in opened:
        context.close()
        assert seen == Seen()


def asked(server: RunningServer, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the server answers without a page."""
    headers = {"Authorization": f"Bearer {KEY}"}
    found = (
        server.client.get(path, headers=headers)
        if body is None
        else server.client.post(path, json=body, headers=headers)
    )
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def words(text: str) -> str:
    """Without what Markdown and line ends make of a text."""
    return " ".join(text.replace("*", " ").replace("#", " ").split())


def test_types_streams_and_is_there_after_a_reload(server: RunningServer, open_page: Open) -> None:
    page = open_page(sampling={"max_tokens": 200})
    page.evaluate(
        """() => { window.lengths = new Set();
        new MutationObserver(() => { const said = document.querySelector('.answer[data-state="answering"] > .prose');
            if (said) lengths.add(said.textContent.length); }).observe(document.body, {subtree: true, childList: true}) }"""
    )
    page.keyboard.type(STORY)
    page.keyboard.press("Enter")
    page.locator('.answer[data-state="done"]').wait_for()
    assert page.evaluate("window.lengths.size") > 2, "it did not come by and by"
    body = {"messages": [{"role": "user", "content": STORY}], "temperature": 0, "max_tokens": 200}
    expected = asked(server, "/v1/chat/completions", body)
    assert [words(text) for text in answers(page)] == [words(expected["choices"][0]["message"]["content"])]
    figures = page.locator(".figures").inner_text()
    assert f"{expected['usage']['completion_tokens']} tokens" in figures and "tokens/s" in figures, figures
    before = answers(page)
    spoken = page.locator("#spoken p").all_text_contents()
    assert words(" ".join(spoken)) == words(before[0])  # to those who listen, block by block
    page.reload()
    page.locator('.answer[data-state="done"]').wait_for()
    assert questions(page) == [STORY] and answers(page) == before
    until_titles(page, [STORY])
    ranks = asked(server, "/cluster")["ranks"]
    rows = page.locator(".rank").all_inner_texts()
    assert len(rows) == len(ranks) == 2
    assert all(rank["host"] in row for rank, row in zip(ranks, rows, strict=True))


@pytest.mark.slow
def test_stops_and_lets_the_reader_scroll(server: RunningServer, open_page: Open) -> None:
    page = open_page(viewport={"width": 800, "height": 420}, sampling={"max_tokens": STORY_TOKENS})
    page.locator("#cluster-pill[aria-expanded='true']").click()
    ask(page, STORY, wait=False)
    scroll = page.locator("#scroll")
    page.wait_for_selector(".answer > .prose > :nth-child(1)")
    while scroll.evaluate("it => it.scrollHeight - it.clientHeight") < 250:
        page.wait_for_timeout(100)
    assert scroll.evaluate("it => it.scrollHeight - it.scrollTop - it.clientHeight") < 48, "it does not follow"
    page.mouse.move(300, 200)
    page.mouse.wheel(0, -150)
    page.locator("#jump").wait_for()
    top, height = scroll.evaluate("it => [it.scrollTop, it.scrollHeight]")
    while scroll.evaluate("it => it.scrollHeight") < height + 60:
        page.wait_for_timeout(100)
    assert scroll.evaluate("it => it.scrollTop") == top, "it pulled the reader away"
    page.keyboard.press("Escape")
    page.locator('.answer[data-state="stopped"]').wait_for()
    assert "Stopped" in page.locator(".figures").inner_text()
    while asked(server, "/cluster")["running"]:
        page.wait_for_timeout(100)
    said = answers(page)
    page.reload()
    page.locator('.answer[data-state="stopped"]').wait_for()
    assert answers(page) == said and said[0]


@pytest.mark.slow
def test_several_conversations(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    ask(page, QUESTION)
    first = answers(page)
    page.locator("#new").click()
    ask(page, OTHER, wait=False)
    page.locator("#list .open", has_text=QUESTION).click()  # while the other is answered
    assert answers(page) == first
    page.locator("#list .open", has_text=OTHER).click()
    until_answered(page)
    second = answers(page)
    assert second != first
    until_titles(page, [OTHER, QUESTION])
    page.locator("#search").fill("capital france")
    until_titles(page, [QUESTION])
    page.locator("#search").fill("")
    row = page.locator(".row", has_text=OTHER)
    row.hover()
    row.get_by_role("button", name="Rename").click()
    page.keyboard.type("The sea")
    page.keyboard.press("Enter")
    until_titles(page, ["The sea", QUESTION])
    with page.expect_download() as download:
        page.locator("#open-settings").click()
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.json")
    page.keyboard.press("Escape")
    row = page.locator(".row", has_text="The sea")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    until_titles(page, [QUESTION])
    assert answers(page) == []
    page.get_by_role("button", name="Undo").click()
    until_titles(page, ["The sea", QUESTION])
    assert answers(page) == second
    other = open_page()
    bring(other, tmp_path / "all.json")
    other.locator("#list .open", has_text=QUESTION).click()
    until_titles(other, ["The sea", QUESTION])
    assert answers(other) == first


@pytest.mark.slow
def test_by_the_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    press = page.keyboard.press
    page.keyboard.type("First line")
    press("Shift+Enter")
    page.keyboard.type(QUESTION)
    press("Enter")
    until_answered(page)
    assert questions(page) == [f"First line\n{QUESTION}"]
    press("ArrowUp")  # edits the last question
    press("Control+a")
    page.keyboard.type(OTHER)
    press("Enter")
    page.locator(".question .bubble", has_text=OTHER).wait_for()
    until_answered(page)
    assert questions(page) == [OTHER] and len(answers(page)) == 1
    page.locator("#question").focus()
    press("Alt+n")
    page.keyboard.type(QUESTION)
    press("Enter")
    until_answered(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    press("Alt+c")
    page.locator(".toast", has_text="Copied").wait_for()
    assert words(page.evaluate("navigator.clipboard.readText()")) == words(answers(page)[0])
    press("Alt+ArrowDown")
    assert questions(page) == [OTHER]
    press("Alt+k")
    page.keyboard.type("france")
    until_titles(page, [QUESTION])
    press("Tab")  # the conversation that was found
    press("Enter")
    assert questions(page) == [QUESTION]
    page.locator("body").evaluate("() => document.activeElement.blur()")
    press("?")
    assert page.locator("#keys").is_visible()
    press("Escape")
    assert not page.locator("#keys").is_visible()
    for place in reached_by_tab(page):
        assert place["outline"] != "none", f"no visible focus on {place['html']}"


@pytest.mark.slow
def test_system_prompt_and_sampling_are_those_of_the_conversation(server: RunningServer, open_page: Open) -> None:
    page = open_page()
    system, sampling = "You answer in capital letters.", {"temperature": 0.7, "top_p": 0.9, "max_tokens": 24, "seed": 7}
    page.locator("#open-tune").click()
    page.locator("#tune [name=system]").fill(system)
    page.locator("#tune [name=temperature]").fill("9")
    page.keyboard.press("Enter")
    page.locator("#tune .problem", has_text="from 0 to 2").wait_for()
    for name, value in sampling.items():
        page.locator(f"#tune [name={name}]").fill(str(value))
    page.locator("#tune").get_by_role("button", name="Save").click()
    ask(page, QUESTION)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
    expected = asked(server, "/v1/chat/completions", {"messages": messages, **sampling})
    assert words(answers(page)[0]) == words(expected["choices"][0]["message"]["content"])
    page.locator("#new").click()
    page.locator("#open-tune").click()
    assert page.locator("#tune [name=system]").input_value() == ""  # another one has its own


@pytest.mark.slow
def test_on_a_narrow_screen(open_page: Open, tmp_path: Path) -> None:
    page = open_page(viewport=NARROW)
    assert not page.locator("#side").is_visible()
    ask(page, QUESTION)
    page.locator("#side-open").click()
    until_titles(page, [QUESTION])
    assert page.locator("#side").is_visible()
    wide = "| " + " | ".join(f"column {number}" for number in range(12)) + " |\n" + "|--" * 12 + "|\n"
    text = f"{'a' * 300} `{'b' * 300}`\n\n```python\n{'c' * 300}\n```\n\n{wide}"
    (tmp_path / "wide.json").write_text(json.dumps(file_of([text])))
    bring(page, tmp_path / "wide.json")
    page.locator("#list .open", has_text="Imported").click()
    page.locator(".code").wait_for()
    page.locator("#cluster-pill").click()
    for element in ("html", "body", "#scroll", "#main"):
        has, room = page.locator(element).evaluate("it => [it.scrollWidth, it.clientWidth]")
        assert has <= room, f"{element} scrolls sideways: {has} in {room}"


@pytest.mark.slow
def test_an_answer_can_neither_run_nor_load(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    for text in HOSTILE:
        found = page.evaluate(
            f"""async (text) => {{ const {{ Rendered }} = await import(new URL("markdown.js", document.baseURI));
            const element = document.createElement("div"); document.body.append(element);
            for (let end = 1; end <= text.length; end++) new Rendered(element).show(text.slice(0, end), true);
            element.replaceChildren(); new Rendered(element).show(text);
            await new Promise((done) => setTimeout(done, 20));
            const found = ({EXAMINE})(element); element.remove(); return found }}""",
            text,
        )
        assert_harmless(found)
    assert page.evaluate("window.harmed") is None
    (tmp_path / "hostile.json").write_text(json.dumps(file_of(HOSTILE)))
    bring(page, tmp_path / "hostile.json")
    for _ in range(2):  # as imported, and as kept
        page.locator("#list .open", has_text="Imported").click()
        assert len(answers(page)) == len(HOSTILE)
        for summary in page.locator(".reasoning summary").all():
            summary.click()
        for prose in page.locator("#thread .prose").all():
            assert_harmless(prose.evaluate(EXAMINE))
        assert ELSEWHERE in page.locator("#thread").inner_text()  # the link of the picture is shown
        assert page.evaluate("window.harmed") is None
        page.reload()


@pytest.mark.slow
def test_asks_for_the_key(open_page: Open) -> None:
    page = open_page(key="wrong")
    page.locator("#key[open]").wait_for()
    page.get_by_role("button", name="Not now").click()
    ask(page, QUESTION, wait=False)
    page.locator("#key input").fill("another wrong one")
    page.keyboard.press("Enter")
    page.locator("#key[open]").wait_for()
    page.locator("#key input").fill(KEY)
    page.keyboard.press("Enter")
    page.locator('.answer[data-state="done"]').wait_for()  # without being asked again
    assert answers(page)[0]
    page.reload()
    page.locator(".pill[data-state='ready']").wait_for()
    assert not page.locator("#key").is_visible()


@pytest.mark.slow
def test_says_that_the_network_is_gone(open_page: Open) -> None:
    page = open_page()
    page.locator(".pill[data-state='ready']").wait_for()
    page.context.set_offline(True)
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".failed", has_text="cannot be reached").wait_for()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.locator('.answer[data-state="done"]').wait_for()
    assert questions(page) == [QUESTION] and not page.locator(".failed").is_visible()


@pytest.mark.slow
def test_an_error_of_the_server_is_shown(open_page: Open) -> None:
    page = open_page()
    ask(page, "many words " * 6000)
    page.locator(".failed", has_text="8192").wait_for()  # the positions that there are
    page.locator("#question").press("ArrowUp")
    page.keyboard.press("Control+a")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.locator('.answer[data-state="done"]').wait_for()
    assert questions(page) == [QUESTION] and not page.locator(".failed").is_visible()


@pytest.mark.slow
def test_waits_while_the_server_loads_and_while_it_is_busy(
    mpirun: Launcher, smollm2: Path, cache: dict[str, str], tmp_path: Path, browser: Any
) -> None:
    """With a server of its own: it answers one at a time, and nobody may wait."""
    options = ("--model", str(smollm2), "--parallel", "1", "--queue", "1", "--context", "8192")
    with closing(browser.new_context()) as context:
        context.add_init_script("""localStorage["tpimpi.defaults"] = '{"sampling": {"max_tokens": 8}}'""")
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        with closing(RunningServer(mpirun, 1, tmp_path / "log", *options, env=cache)) as server:
            page.goto(server.url)
            ask(page, QUESTION)  # where the model is not loaded yet, it goes on when it is
            assert len(answers(page)) == 1 and answers(page)[0]
            body = {"messages": [{"role": "user", "content": STORY}], "temperature": 0, "max_tokens": STORY_TOKENS}
            with ExitStack() as others:
                for _ in range(2):
                    others.enter_context(
                        server.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True})
                    )
                ask(page, OTHER, wait=False)
                page.locator(".waiting", has_text="The server is busy; asking again in").wait_for()
            until_answered(page)
            assert len(answers(page)) == 2 and answers(page)[1]


@pytest.mark.slow
def test_a_rank_that_dies_is_named(server: RunningServer, open_page: Open) -> None:
    """The last one: it ends the server."""
    page = open_page(sampling={"max_tokens": STORY_TOKENS})
    ask(page, STORY, wait=False)
    page.wait_for_selector(".answer > .prose > *")
    server.rank(1).kill()
    until_answered(page)
    said = page.locator(".failed").inner_text()
    assert "The answer broke off" in said and "r1" in said, said
    assert answers(page)[0]  # what had come stays
