"""Requests that mean harm: each has an error of OpenAI's form, the server says nothing of it, and answers the next one."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.support.fronts import READY, TIMEOUT_S, Front, StandIn
from tests.support.hostile_requests import BODIES, FAULTS, HTTP, KEY, ODD, SCHEMAS, http, places, with_odd
from tests.support.launch import TIMEOUT, Launcher
from tests.support.servers import RunningServer
from tpimpi.serving.server import wire
from tpimpi.serving.server.front_options import FrontOptions

AUTH = {"Authorization": f"Bearer {KEY}"}
ASKED: list[Any] = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = "/v1/messages"


@pytest.fixture(scope="module")
def running(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "keys").write_text(f"{KEY}\n")
    options = ("--model", str(smollm2), "--context", "256", "--api-key-file", str(folder / "keys"))
    running = RunningServer(mpirun, 2, folder / "log", *options, env=cache)
    running.until_ready()
    running.client.headers.update(AUTH)
    yield running
    running.close()


@pytest.fixture
def server(running: RunningServer) -> Iterator[RunningServer]:
    """Which is as it was after each test, and has said nothing."""
    before = running.said()
    yield running
    check_good(running.client)
    assert running.said() == before


def check_good(client: httpx2.Client) -> None:
    found = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert found.status_code == 200 and len(found.json()["choices"]) == 1, found.text


def check_error(path: str, body: bytes) -> None:
    """It has OpenAI's form, at /v1/messages Anthropic's."""
    found = json.loads(body)
    if path.startswith(MESSAGES):
        assert set(found) == {"type", "error"} and found["type"] == "error"
    else:
        assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"]["message"] and found["error"]["type"] and "\n" not in found["error"]["message"]


# HTTP


def exchange(url: str, data: bytes) -> tuple[int, bytes]:
    """What is answered to these bytes: the status, and the body."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        with contextlib.suppress(OSError):  # it may be closed before all was sent
            connection.sendall(data)
        found = b""
        while True:
            head, end, body = found.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            if end and length is not None and len(body) >= int(length[1]):
                return int(head.split(b" ")[1]), body[: int(length[1])]
            more = connection.recv(1 << 16)
            assert more, f"closed after {found!r}"
            found += more


PATHS_OF_KEYS = (
    "/v1/models",
    "/v1//models",
    "/v1%2fmodels",
    "/%76%31/models",
    "/v1/",
    "/metrics",
    "/metrics/",
    "/cluster",
)


def test_http(server: RunningServer) -> None:
    for name, (data, status) in HTTP.items():
        found, body = exchange(server.url, data)
        assert found == status, (name, found, body)
        check_error("/", body)
        check_good(server.client)
    assert exchange(server.url, http(b"/index.html", headers=b"Range: bytes=a-b\r\n"))[0] == 200  # never in parts
    with httpx2.Client(base_url=server.url) as stranger:
        for path in PATHS_OF_KEYS:
            for key in (b"", b"Bearer", b"Bearer \xff", b"Bearer " + b"a" * 60000):
                found = stranger.get(path, headers={b"Authorization": key})
                assert found.status_code == 401, path
                check_error(path, found.content)
        refused = stranger.options("/v1/models", headers={"Origin": "http://evil.example"})
        assert refused.status_code == 403 and not any(name.startswith("access-control") for name in refused.headers)
        wrong = stranger.post(MESSAGES, json={}, headers={"x-api-key": "wrong-key"})
        assert wrong.status_code == 401
        check_error(MESSAGES, wrong.content)


def check_body(client: httpx2.Client, path: str, content: str | bytes) -> None:
    found = client.post(path, content=content)
    assert found.status_code in (200, 400, 404), (path, content[:300], found.text)
    if found.status_code != 200:
        check_error(path, found.content)


def test_odd_values(server: RunningServer) -> None:
    for number, place, odd in FAULTS:
        path, body = BODIES[number]
        check_body(server.client, path, with_odd(body, place, ODD[odd]))
    for content in (
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"prompt": "\xc3"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b"[]" * 200_000,
    ):
        found = server.client.post("/v1/completions", content=content)
        assert found.status_code == 400, content[:40]
        check_error("/", found.content)
    for stops in (["ab" * 200_000] * 16, ["a" + "ab" * 2_000_000], [""], ["a"] * 17):
        for path, name in (("/v1/chat/completions", "stop"), (MESSAGES, "stop_sequences")):
            found = server.client.post(path, json={"messages": ASKED, "max_tokens": 1, name: stops})
            assert found.status_code == 400 and name in found.text
            check_error(path, found.content)
    deep = "[" * 600 + "]" * 600  # JSON in a text, which is no part of the body's
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": deep}}
    called = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    odd_tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": []}}}
    for path, body, name in (
        ("/v1/chat/completions", {"messages": called, "max_tokens": 1, "tools": [TOOL]}, ""),
        ("/v1/chat/completions", {"messages": ASKED, "tools": [odd_tool]}, "properties"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ("/detokenize", {"tokens": [1] * 100_000}, "context"),
    ):
        found = server.client.post(path, json=body)
        assert found.status_code in ((200, 400) if not name else (400,)) and name in found.text, (path, found.text)
        assert server.client.get("/health").status_code == 200
    twice = server.client.post("/v1/completions", content=b'{"max_tokens": 0, "prompt": "a", "max_tokens": 1}')
    assert twice.status_code == 200, "of a name that comes twice the last counts"


@pytest.mark.slow
@pytest.mark.any_mpi
def test_odd_values_everywhere(server: RunningServer) -> None:
    wanted = [
        (path, with_odd(body, place, odd)) for path, body in BODIES for place in places(body) for odd in ODD.values()
    ]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda one: check_body(server.client, *one), wanted):
            pass


REFUSED = {"elsewhere", "a file", "elsewhere, by its base", "no regex", "a regex of optional letters", "two steps"}
REFUSED |= {"objects in objects", "patterns at once", "names by patterns", "fields of alternatives"}


@pytest.mark.slow
@pytest.mark.any_mpi
def test_schemas_that_explode(server: RunningServer) -> None:
    pytest.importorskip("llguidance")
    for name, schema in SCHEMAS.items():
        format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        for fields in ({"response_format": format_}, {"tools": [tool], "tool_choice": "required"}):
            body = {"messages": ASKED, "max_tokens": 4, "temperature": 0, **fields}
            found = server.client.post("/v1/chat/completions", json=body, timeout=TIMEOUT)
            assert found.status_code in (200, 400), (name, found.text)
            if found.status_code == 400:
                check_error("/", found.content)
        assert found.status_code == 400 or name not in REFUSED, name
        check_good(server.client)


# Clients that are slow


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def trickle(url: str, begin: bytes, answers: list[bytes]) -> None:
    """Send a request byte by byte, until the server has had enough; what it said."""
    found = b""
    with connect(url) as slow, contextlib.suppress(ConnectionError):
        slow.sendall(begin)
        slow.settimeout(0.5)
        while True:
            try:
                more = slow.recv(1 << 16)
                if not more:
                    break
                found += more
            except TimeoutError:
                slow.sendall(b"1")
    answers.append(found)


@pytest.mark.slow
def test_slow_clients(tmp_path: Path) -> None:
    """Connections that say nothing, more than files may be open at first; headers and bodies byte by byte; and a client that
    takes nothing of what it asked for: all have an end, and nobody else waits."""
    answers: list[bytes] = []
    with (tmp_path / "stderr").open("wb") as stderr, contextlib.ExitStack() as stack:
        front = Front(FrontOptions(socket=str(tmp_path / "front"), port=0), stderr=stderr, files=256)
        stack.callback(front.close)
        rank = StandIn(str(tmp_path / "front"))
        stack.callback(rank.close)
        rank.say(READY)
        url = front.listening.url
        silent = [stack.enter_context(connect(url)) for _ in range(1000)]
        begun = http(b"/v1/completions", method=b"POST")[:-2]
        lengthy = begun + b"Content-Length: 1000000\r\n\r\n"
        slow = [threading.Thread(target=trickle, args=(url, one, answers)) for one in (begun + b"X: ", lengthy)]
        for thread in slow:
            thread.start()
        deaf = stack.enter_context(connect(url))
        body = b'{"prompt": "a", "stream": true}'
        deaf.sendall(begun + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        ask = rank.hear()
        assert isinstance(ask, wire.Ask)
        before = psutil.Process(front.process.pid).memory_info().rss
        rank.say(wire.Began(ask.id, 1))
        for _ in range(200):  # far more than the system keeps for a connection
            rank.say(*[wire.Part(ask.id, "a" * 1000, "", [1])] * 100)
        assert httpx2.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200
        assert rank.hear() == wire.Cancel(ask.id), "it is given up"
        assert psutil.Process(front.process.pid).memory_info().rss < before + (100 << 20)
        for thread in slow:
            thread.join()
        headers, bodies = sorted(answers, key=len)
        assert headers == b"" and bodies.startswith(b"HTTP/1.1 408 ")
        assert all(one.recv(1) == b"" for one in silent)
    assert (tmp_path / "stderr").read_bytes() == b""


def test_large_bodies_that_do_not_end(tmp_path: Path) -> None:
    """They share what the front keeps of bodies; small ones come through beside them."""
    with contextlib.ExitStack() as stack:
        front = Front(FrontOptions(socket=str(tmp_path / "front"), port=0))
        stack.callback(front.close)
        rank = StandIn(str(tmp_path / "front"))
        stack.callback(rank.close)
        rank.say(READY)
        url = front.listening.url
        begun = http(b"/v1/completions", method=b"POST", headers=b"Content-Length: %d\r\n" % (8 << 20))
        large = [stack.enter_context(connect(url)) for _ in range(64)]
        for one in large:
            with contextlib.suppress(ConnectionError):
                one.sendall(begun + b" " * (7 << 20))
        with ThreadPoolExecutor() as pool:
            small = pool.submit(httpx2.post, f"{url}/tokenize", json={"prompt": "b"}, timeout=TIMEOUT_S)
            counted = rank.hear()
            rank.say(wire.Counted(counted.id, [1]))
            assert small.result().json()["tokens"] == [1]
        refused, _, _ = select.select(large, [], [], TIMEOUT_S)
        with contextlib.suppress(ConnectionError):  # which it has closed while more came
            assert refused[0].recv(12) == b"HTTP/1.1 429"
        assert (
            psutil.Process(front.process.pid).memory_info().rss < 400 << 20
        )  # and not 64 times 7 MiB more than at first
