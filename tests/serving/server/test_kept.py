"""Requests with an Idempotency-Key, asked again: of a front that lives, or of the next one; with a stand-in for rank 0."""

from __future__ import annotations

import contextlib
import json
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from tests.support.fronts import PASSPHRASE, READY, TIMEOUT_S, Front, StandIn, written
from tpimpi.serving.sealed_lines import LineSeal
from tpimpi.serving.server import front as front_module
from tpimpi.serving.server import wire
from tpimpi.serving.server.front_options import FrontOptions
from tpimpi.serving.server.journal import Begun, Forgotten, Held

Start = Callable[..., Front]
BODY = {"messages": [{"role": "user", "content": "Zanzibar?"}], "stream": True}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    fronts: list[Front] = []

    def started(**options: object) -> Front:
        fronts.append(Front(FrontOptions(socket=str(tmp_path / "front"), port=0, outlives=True, **options)))  # type: ignore[arg-type]
        return fronts[-1]

    yield started
    for front in fronts:
        front.close()


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    ranks: list[StandIn] = []

    def made(fingerprint: str = "") -> StandIn:
        ranks.append(StandIn(str(tmp_path / "front")))
        ranks[-1].say(msgspec.structs.replace(READY, fingerprint=fingerprint))
        return ranks[-1]

    yield made
    for one in ranks:
        one.close()


class Client:
    """One that asks with a key, in a thread of its own; `text` is what has come."""

    def __init__(self, front: Front, key: str = "k", body: dict[str, Any] = BODY, **headers: str) -> None:
        self.text, self.why, self.status = "", "", 0
        self._leaves = threading.Event()
        self._asked = (front, {"Idempotency-Key": key, **headers}, body)
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        front, headers, body = self._asked
        url = f"{front.listening.url}/v1/chat/completions"
        with (
            contextlib.suppress(httpx2.TransportError),
            httpx2.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT_S) as response,
        ):
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    self.why = event["choices"][0]["finish_reason"] or self.why
                    self.text += event["choices"][0]["delta"].get("content") or ""
                if self._leaves.is_set():
                    return

    def until(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.text != text:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def leave(self) -> None:
        """At the next words."""
        self._leaves.set()

    def end(self) -> tuple[str, str]:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.text, self.why


def part(ask: wire.Ask, text: str, *tokens: int) -> wire.Part:
    return wire.Part(ask.id, text, "", list(tokens))


def heard(rank: StandIn) -> wire.Ask:
    ask = rank.hear()
    assert isinstance(ask, wire.Ask), ask
    return ask


def begin(rank: StandIn, front: Front, key: str = "k") -> tuple[Client, wire.Ask]:
    """An answer whose first word has come."""
    client = Client(front, key)
    ask = heard(rank)
    rank.say(wire.Began(ask.id, 5), part(ask, "One ", 10, 11))
    client.until("One ")
    return client, ask


def test_a_client_that_comes_back_gets_the_answer(start: Start, rank: Callable[..., StandIn]) -> None:
    """From the first token, going on where it was; while nobody is there nothing is computed, and once it is done either."""
    front = start()
    server = rank()
    client, ask = begin(server, front)
    client.leave()
    server.say(part(ask, "two ", 12))
    client.end()
    assert server.hear() == wire.Cancel(ask.id)
    second = Client(front)
    again = heard(server)
    assert again == msgspec.structs.replace(ask, id=again.id, so_far=[10, 11, 12]) and ask.sampling.seed is not None
    third = Client(front)  # beside the second, which may be gone without anybody knowing
    third.until("One two ")
    server.say(part(again, "three.", 13), wire.Done(again.id, "end", 4, 0))
    assert second.end() == third.end() == ("One two three.", "stop")
    assert Client(front).end() == ("One two three.", "stop")
    whole = Client(front, key="other")
    ask = heard(server)  # and nothing was asked before
    server.say(wire.Began(ask.id, 5), part(ask, "x", 1), wire.Done(ask.id, "end", 1, 0))
    assert whole.end() == ("x", "stop")
    metrics = httpx2.get(f"{front.listening.url}/metrics", timeout=TIMEOUT_S).text
    assert "\ntpimpi_first_token_seconds_count 2.0\n" in metrics  # those who asked first: who comes back does not count
    assert "\ntpimpi_request_seconds_count 1.0\n" in metrics


def test_another_request_with_the_same_key_is_refused(start: Start, rank: Callable[..., StandIn]) -> None:
    front = start()
    server = rank()
    client, ask = begin(server, front)
    for path, body in (("chat/completions", {**BODY, "max_tokens": 3}), ("completions", {"prompt": "a"})):
        url = f"{front.listening.url}/v1/{path}"
        found = httpx2.post(url, json=body, headers={"Idempotency-Key": "k"}, timeout=TIMEOUT_S)
        assert found.status_code == 422 and found.json()["error"]["code"] == "idempotency_key_reused"
    server.say(wire.Done(ask.id, "end", 2, 0))
    assert client.end() == ("One ", "stop")


def test_what_ended_with_an_error_is_done_anew(start: Start, rank: Callable[..., StandIn]) -> None:
    front = start()
    server = rank()
    client = Client(front)
    server.say(wire.Refused(heard(server).id, "too long", "messages"))
    client.end()
    assert client.status == 400
    second = Client(front)
    ask = heard(server)
    server.say(wire.Began(ask.id, 5), wire.Done(ask.id, "end", 0, 0))
    assert second.end() == ("", "stop")


def test_keys_of_others_are_other_keys(start: Start, rank: Callable[..., StandIn], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann=annsannsanns\nbob=bobsbobsbobs\n")
    front = start(api_key_file=str(tmp_path / "keys"))
    server = rank()
    clients = []
    for name in ("ann", "bob"):
        clients.append(Client(front, authorization=f"Bearer {3 * f'{name}s'}"))
        ask = heard(server)
        assert ask.owner == name
        server.say(wire.Began(ask.id, 5), part(ask, name, 1), wire.Done(ask.id, "end", 1, 0))
    assert [one.end()[0] for one in clients] == ["ann", "bob"]


# The journal


def journal_options(tmp_path: Path) -> dict[str, Any]:
    return {"journal": str(tmp_path / "journal"), "journal_passphrase": PASSPHRASE}


def kill(front: Front) -> None:
    front.process.send_signal(signal.SIGKILL)
    front.process.wait(TIMEOUT_S)


def until_written(path: Path, *texts: str) -> None:
    """Until the journal has them, by its own words."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        found = written(path)
        if all(text.encode() in found for text in texts):
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_another_front_goes_on(start: Start, rank: Callable[..., StandIn], tmp_path: Path) -> None:
    """With what was under way, without its client; not with what its client left; what was done is there."""
    options, path = journal_options(tmp_path), tmp_path / "journal"
    front = start(**options)
    first = rank()
    left, ask = begin(first, front, "left")
    left.leave()
    first.say(part(ask, "x", 12))
    left.end()
    assert isinstance(first.hear(), wire.Cancel)
    client, ask = begin(first, front, "done")
    first.say(wire.Done(ask.id, "end", 2, 0))
    client.end()
    client, ask = begin(first, front)
    first.say(part(ask, "two ", 12))
    client.until("One two ")
    until_written(path, "two ")
    kill(front)
    client.end()
    assert b"Zanzibar" not in path.read_bytes() and b"two" not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    front = start(**options)
    second = rank()
    again = heard(second)
    assert again == msgspec.structs.replace(ask, id=again.id, so_far=[10, 11, 12])
    second.say(part(again, "three.", 13), wire.Done(again.id, "end", 4, 0))
    assert Client(front).end() == ("One two three.", "stop")
    assert Client(front, "done").end() == ("One ", "stop")
    client = Client(front, "left")
    again = heard(second)
    assert again.so_far == [10, 11, 12]
    second.say(wire.Done(again.id, "end", 3, 0))
    assert client.end() == ("One x", "stop")
    until_written(path, f'["Done",{again.id},')
    kill(front)

    front = start(**options)  # all is done: nothing is asked
    third = rank()
    assert Client(front).end() == ("One two three.", "stop")
    whole = Client(front, "new")
    ask = heard(third)
    third.say(wire.Began(ask.id, 5), wire.Done(ask.id, "end", 0, 0))
    assert whole.end() == ("", "stop")


def test_with_another_model_it_begins_again(start: Start, rank: Callable[..., StandIn], tmp_path: Path) -> None:
    front = start(**journal_options(tmp_path))
    client, ask = begin(rank("a"), front)
    until_written(tmp_path / "journal", "One ")
    kill(front)
    client.end()
    front = start(**journal_options(tmp_path))
    client = Client(front)
    server = rank("b")
    again = heard(server)
    assert again == msgspec.structs.replace(ask, id=again.id)
    server.say(wire.Began(again.id, 6), part(again, "Uno", 7), wire.Done(again.id, "end", 1, 0))
    assert client.end() == ("Uno", "stop")


def test_a_journal_that_cannot_be_used_is_said_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ask = wire.Ask(0, "", wire.Text("a"), wire.Sampling())
    seal = LineSeal(PASSPHRASE.encode(), what="journal")
    lines = [msgspec.json.encode(one) + b"\n" for one in (Begun(1, "", "k", "f", 0.0, "m", 1, [ask]), Forgotten(1))]
    good = [seal.first_line, *map(seal.seal, lines)]
    other = LineSeal(b"other", what="journal").first_line
    session = LineSeal(PASSPHRASE.encode()).first_line
    unknown = LineSeal(PASSPHRASE.encode(), seal.first_line, "journal")
    strange = [seal.first_line, unknown.seal(msgspec.json.encode(Held(7, held=True)) + b"\n")]
    for content, said in (
        (b"# notes\n", "is there, and is no journal; give the name of a new file, or of a journal"),
        (session, "is there, and is no journal"),
        (other, "the passphrase in --journal-key-file is not the one that it was begun with"),
        (b"".join([good[0], good[2], good[1]]), "is broken in line 2"),
        (b"".join([good[0], good[1][:40] + b"A" + good[1][41:]]), "is broken in line 2"),
        (b"".join(strange), "is broken in line 2"),
    ):
        path.write_bytes(content)
        front = Front(FrontOptions(socket=str(tmp_path / "front"), port=0, **journal_options(tmp_path)))
        assert said in front.listening.problem and "--journal" in front.listening.problem, said
        assert front.process.wait(TIMEOUT_S) == 2 and path.read_bytes() == content, said
        front.close()
    path.write_bytes(b"".join(good) + good[1][:-1])  # ended in the middle of a line
    front = Front(FrontOptions(socket=str(tmp_path / "front"), port=0, **journal_options(tmp_path)))
    assert not front.listening.problem
    front.close()


def test_a_journal_in_use_is_waited_for(start: Start, tmp_path: Path) -> None:
    options = journal_options(tmp_path)
    first = start(**options)
    busy = Front(FrontOptions(socket=str(tmp_path / "other"), port=0, **options))
    assert "is in use by another run" in busy.listening.problem and busy.process.wait(TIMEOUT_S) == 2
    busy.close()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(
            lambda: Front(FrontOptions(socket=str(tmp_path / "other"), port=0, journal_wait=TIMEOUT_S, **options))
        )
        with pytest.raises(TimeoutError):
            waiting.result(1.0)
        kill(first)
        second = waiting.result(TIMEOUT_S)
    assert not second.listening.problem
    second.close()


def test_who_waits_for_a_journal_ends_with_its_input(start: Start, tmp_path: Path) -> None:
    options = journal_options(tmp_path)
    start(**options)
    waiting = FrontOptions(socket=str(tmp_path / "other"), port=0, journal_wait=100 * TIMEOUT_S, **options)
    found = subprocess.run(
        [sys.executable, "-m", front_module.__name__],
        input=msgspec.json.encode(waiting) + b"\n",
        capture_output=True,
        timeout=TIMEOUT_S / 4,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, b"") and b"waiting for its end" in found.stderr
