"""The front by itself, with a stand-in for rank 0 on its socket: what it keeps when rank 0 goes, and what it sends."""

from __future__ import annotations

import json
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import msgspec
import pytest

from tests.support.fronts import READY, TIMEOUT_S, Front, StandIn
from tpimpi.serving.server import wire
from tpimpi.serving.server.front_options import FrontOptions

Start = Callable[..., Front]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    fronts: list[Front] = []

    def started(**options: object) -> Front:
        fronts.append(Front(FrontOptions(socket=str(tmp_path / "front"), port=0, **options)))  # type: ignore[arg-type]
        return fronts[-1]

    yield started
    for front in fronts:
        front.close()


def test_an_answer_goes_on_with_another_rank_0(start: Start, tmp_path: Path) -> None:
    """The client sees a pause, and no text twice; what is asked again has the tokens so far, and the same seed."""
    front = start(outlives=True)
    url, path = front.listening.url, str(tmp_path / "front")
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert httpx2.get(f"{url}/health").json()["status"] == "loading"
    first = StandIn(path)
    first.say(wire.Progress("slices", 0.25))
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "stream_options": {"include_usage": True}}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx2.post, f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
        count = pool.submit(httpx2.post, f"{url}/tokenize", json={"prompt": "b"}, timeout=TIMEOUT_S)
        first.say(READY)
        asked = {type(question): question for question in (first.hear(), first.hear())}
        ask, counted = asked[wire.Ask], asked[wire.Count]
        assert isinstance(ask, wire.Ask) and isinstance(counted, wire.Count)
        assert ask.so_far == [] and ask.sampling.seed is not None and ask.prompt.messages == body["messages"]
        assert httpx2.get(f"{url}/health").status_code == 200
        first.say(wire.Began(ask.id, 5), wire.Part(ask.id, "One ", "", [10, 11]), wire.Part(ask.id, "two", "", [12]))
        first.say(wire.Figures(1.0, 3, 5, 0, 1, 0, 1, 4, [wire.RankFigures(0, "h", 1, None, 0, 0.0, 0.5, 0.25)]))
        while not httpx2.get(f"{url}/cluster").json()["ranks"]:
            pass
        first.close()
        while httpx2.get(f"{url}/health").status_code == 200:
            pass
        assert not answer.done() and not count.done()
        second = StandIn(path)
        second.say(READY)
        again = {type(question): question for question in (second.hear(), second.hear())}
        assert again[wire.Ask] == msgspec.structs.replace(ask, so_far=[10, 11, 12])
        assert again[wire.Count] == counted
        second.say(wire.Counted(counted.id, [1, 2]), wire.Began(ask.id, 5), wire.Part(ask.id, ", three.", "", [13]))
        second.say(wire.Done(ask.id, "end", 4, 0))
        assert count.result().json()["tokens"] == [1, 2]
        lines = [line.removeprefix("data: ") for line in answer.result().text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(texts) == "One two, three." and chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 4 and chunks[-1]["usage"]["prompt_tokens"] == 5
    second.close()


def test_a_client_that_goes_is_cancelled_before_it_is_answered(start: Start, tmp_path: Path) -> None:
    front = start()
    rank = StandIn(str(tmp_path / "front"))
    rank.say(READY)
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{front.listening.url}/v1/completions", json={"prompt": "a", "n": 2}, timeout=1.0)
    asked = [rank.hear(), rank.hear()]
    cancelled = [rank.hear(), rank.hear()]
    assert {one.id for one in cancelled if isinstance(one, wire.Cancel)} == {one.id for one in asked} == {1, 2}
    rank.close()
    assert front.process.wait(TIMEOUT_S) == 0, "it ends with rank 0"


def test_an_answer_that_takes_too_long_is_ended(start: Start, tmp_path: Path) -> None:
    front = start(time_limit=0.5, parallel=1, queue=0)
    body = {"prompt": "a", "n": 1}
    slow = httpx2.post(f"{front.listening.url}/v1/completions", json=body, timeout=TIMEOUT_S)  # there is no rank 0
    assert slow.status_code == 504 and slow.json()["error"]["code"] == "request_timeout"
    rank = StandIn(str(tmp_path / "front"))
    rank.say(READY)
    with httpx2.stream("POST", f"{front.listening.url}/v1/completions", json={**body, "stream": True}) as found:
        ask = rank.hear()
        assert isinstance(ask, wire.Ask)
        rank.say(wire.Began(ask.id, 1))
        assert "request_timeout" in found.read().decode()
    assert rank.hear() == wire.Cancel(ask.id)


def test_without_who_started_it_it_ends(start: Start) -> None:
    front = start()
    assert front.process.stdin is not None
    front.process.stdin.close()
    assert front.process.wait(TIMEOUT_S) == 0


def test_tls(start: Start, tmp_path: Path) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    subprocess.run(
        [*command, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True
    )
    front = start(tls_cert=cert, tls_key=key)
    url = front.listening.url.replace("127.0.0.1", "localhost")
    assert url.startswith("https://")
    assert httpx2.get(f"{url}/health", verify=ssl.create_default_context(cafile=cert)).status_code == 503
    assert "--tls-cert" in start(tls_cert=key, tls_key=cert).listening.problem


def test_other_origins_that_are_allowed(start: Start) -> None:
    front = start(allow_origins=("https://chat.example",), allow_hosts=("home.example",))
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    url = f"{front.listening.url}/v1/chat/completions"
    found = httpx2.options(url, headers=asked)
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, "https://chat.example")
    assert httpx2.options(url, headers={**asked, "Origin": "https://other.example"}).status_code == 403
    assert httpx2.get(f"{front.listening.url}/health", headers={"Host": "home.example:1"}).status_code == 503


def test_a_port_that_is_taken_is_said(start: Start, tmp_path: Path) -> None:
    taken = int(start().listening.url.rpartition(":")[2])
    front = Front(FrontOptions(socket=str(tmp_path / "other"), port=taken))
    assert f"port {taken}" in front.listening.problem and front.process.wait(TIMEOUT_S) == 2
    front.close()
