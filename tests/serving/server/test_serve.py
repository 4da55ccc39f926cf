"""A server with a real model at two ranks, asked by real clients."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.launch import Launcher
from tests.support.servers import RunningServer

TOGETHER, QUEUE = 4, 3
KEYS = {"anna": "sk-anna-0123456789", "bert": "sk-bert-0123456789"}
MODEL = "SmolLM2-135M-Instruct.Q4_1"
PROMPT = "Name a colour."
ASKED = [{"role": "user", "content": PROMPT}]
LONG = [{"role": "user", "content": "Write a very long story about a castle."}]


@pytest.fixture(scope="module")
def server(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text("".join(f"{name}={key}\n" for name, key in KEYS.items()))
    options = ("--model", str(smollm2), "--parallel", str(TOGETHER), "--queue", str(QUEUE), "--context", "1024")
    options = (*options, "--name", "gpt-4o-mini", "--api-key-file", str(folder / "keys"))
    options = (*options, "--draft", str(smollm2), "--speculate", "2")  # a model that drafts for itself
    options = (*options, "--audit", "0.3")
    running = RunningServer(mpirun, 2, folder / "log", *options, env=cache)
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["anna"], max_retries=0, timeout=120) as found:
        found.models.list()  # which waits until the model is loaded
        yield found


@pytest.fixture(scope="module")
def alone(client: openai.OpenAI, mpirun: Launcher, cache: dict[str, str], smollm2: Path) -> str:
    """The answer of a run without a server."""
    options = ("--model", str(smollm2), "--prompt", PROMPT, "--max-tokens", "24", "--quiet")
    result = mpirun(2, "-m", "tpimpi", *options, env=cache)
    assert result.code == 0, result.err
    return result.out.removesuffix("\n")


def ask(server: RunningServer, path: str, body: Any, key: str = KEYS["anna"], **more: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}", **more.pop("headers", {})}
    content = body if isinstance(body, bytes) else json.dumps(body)
    return server.client.post(path, content=content, headers=headers, **more)


def figures(server: RunningServer) -> dict[str, Any]:
    return server.client.get("/cluster", headers={"x-api-key": KEYS["anna"]}).json()


def until_idle(server: RunningServer) -> None:
    until = time.monotonic() + 60
    while (found := figures(server))["running"] or found["waiting"]:
        assert time.monotonic() < until, found
        time.sleep(0.1)


def test_it_listens_while_the_model_is_loaded(server: RunningServer) -> None:
    """And what is asked meanwhile waits. (First in this module: the model is not loaded yet.)"""
    found = server.client.get("/health")
    if found.status_code == 503:
        assert found.json()["status"] == "loading" and found.json()["text"]
    assert ask(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 1}).status_code == 200
    assert server.client.get("/health").json() == {"status": "ready", "model": MODEL, "context": 1024}


def test_a_chat_has_the_answer_of_a_run(client: openai.OpenAI, alone: str) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0, max_completion_tokens=24)
    assert whole.choices[0].message.content == alone
    assert whole.usage is not None and whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 3}
    chunks = list(client.chat.completions.create(model="", messages=ASKED, temperature=0, max_tokens=24, **options))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == alone
    assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    tokens = [one for part in parts if part.logprobs for one in part.logprobs.content]
    assert b"".join(bytes(one.bytes) for one in tokens) == alone.encode() and len(tokens) == 24
    for one in tokens:  # greedy: the likeliest
        assert one.logprob == one.top_logprobs[0].logprob == max(top.logprob for top in one.top_logprobs) <= 0
        assert len(one.top_logprobs) == 3


def test_many_at_once_have_each_the_answer_alone(client: openai.OpenAI, alone: str) -> None:
    def text(number: int) -> str:
        found = client.chat.completions.create(
            model=MODEL, messages=ASKED, temperature=0, max_tokens=24, seed=number, stream=bool(number % 2)
        )
        if number % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)
        return found.choices[0].message.content

    with ThreadPoolExecutor(TOGETHER + QUEUE) as pool:
        assert set(pool.map(text, range(TOGETHER + QUEUE))) == {alone}


def test_choices_stops_seeds_bias_and_content_in_parts(client: openai.OpenAI, alone: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    create = client.chat.completions.create
    stopped = create(model=MODEL, messages=parts, temperature=0, max_tokens=24, stop=[alone[20:26], "never"])
    assert stopped.choices[0].message.content == alone[: alone.index(alone[20:26])]
    assert stopped.choices[0].finish_reason == "stop"
    drawn = [create(model=MODEL, messages=ASKED, seed=5, n=3, max_tokens=12, temperature=1.5) for _ in range(2)]
    texts = [[choice.message.content for choice in one.choices] for one in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert [choice.index for choice in drawn[0].choices] == [0, 1, 2]
    banned = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=1, temperature=0)
    (first,) = client.post("/../tokenize", body={"prompt": banned.choices[0].text}, cast_to=dict)["tokens"]
    other = client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=1, temperature=0, logit_bias={str(first): -100}
    )
    assert other.choices[0].text != banned.choices[0].text
    penalty = {"frequency_penalty": 2.0, "presence_penalty": 2.0}
    plain, other = (
        client.completions.create(model=MODEL, prompt="a a a a a a a a", max_tokens=40, temperature=0, **more)
        for more in ({}, penalty)
    )
    assert len(set(other.choices[0].text.split())) > len(set(plain.choices[0].text.split()))


def test_completions_of_several_prompts(client: openai.OpenAI, server: RunningServer) -> None:
    prompts = ["The sky is", "Water is"]
    many = client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0, n=2, echo=True)
    assert [choice.text.startswith(prompts[place // 2]) for place, choice in enumerate(many.choices)] == [True] * 4
    ids = ask(server, "/tokenize", {"prompt": prompts[1]}).json()["tokens"]
    one = client.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0, logprobs=2, stream=True)
    chunks = [chunk.choices[0] for chunk in one]
    text = "".join(chunk.text for chunk in chunks)
    assert prompts[1] + text == many.choices[2].text == many.choices[3].text
    tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens]
    offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset]
    assert "".join(tokens) == text and offsets == [0, *itertools.accumulate(map(len, tokens[:-1]))]
    assert ask(server, "/detokenize", {"tokens": ids}).json()["content"] == prompts[1]


BAD = {
    "no JSON": (b"{", "invalid_json", None),
    "bytes that are no UTF-8": (b'{"messages":[{"role":"user","content":"\xff"}]}', "invalid_json", None),
    "deep": (b'{"messages":[{"role":"user","content":' + b"[" * 100_000, "invalid_json", None),
    "half a character": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json", None),
    "no messages": ({}, None, None),
    "a wrong type": ({"messages": ASKED, "max_tokens": "x"}, None, "max_tokens"),
    "too few tokens": ({"messages": ASKED, "max_tokens": 0}, None, "max_tokens"),
    "a temperature": ({"messages": ASKED, "temperature": 3}, None, "temperature"),
    "top_p": ({"messages": ASKED, "top_p": 1.5}, None, "top_p"),
    "a bias": ({"messages": ASKED, "logit_bias": {"a": 1}}, None, "logit_bias"),
    "a penalty": ({"messages": ASKED, "presence_penalty": 3}, None, "presence_penalty"),
    "many choices": ({"messages": ASKED, "n": 100}, None, "n"),
    "no content": ({"messages": [{"role": "user"}]}, None, "messages[0].content"),
    "a role": ({"messages": [{"role": "king", "content": "a"}]}, None, "messages[0].role"),
    "audio": ({"messages": ASKED, "audio": {"voice": "a"}}, "unsupported_parameter", "audio"),
    "functions": ({"messages": ASKED, "functions": [{}]}, "unsupported_parameter", "functions"),
    "modalities": ({"messages": ASKED, "modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "unsupported_content",
        "messages[0].content[0]",
    ),
    "far too long": (
        {"messages": [{"role": "user", "content": "word " * 9999}]},
        "context_length_exceeded",
        "messages",
    ),
    "much too long": (
        {"messages": [{"role": "user", "content": "a" * (7 << 20)}]},
        "context_length_exceeded",
        "messages",
    ),
    "too long": ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context_length_exceeded", "messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused_by_name(server: RunningServer, client: openai.OpenAI, name: str) -> None:
    body, code, param = BAD[name]
    for stream in (False, True):
        if isinstance(body, dict):
            body = {**body, "stream": stream}
        found = ask(server, "/v1/chat/completions", body)
        assert found.status_code == 400, found.text
        error = found.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
        assert (error["code"], error["param"]) == (code, param), error


def test_unknown_fields_are_left_out_and_other_models_are_not_here(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    extra = {"store": True, "metadata": {"a": "b"}, "some_field": 1, "user": "u", "parallel_tool_calls": True}
    assert create(model="GPT-4o-mini", messages=ASKED, max_tokens=1, extra_body=extra).model == MODEL
    with pytest.raises(openai.NotFoundError) as raised:
        create(model="gpt-5", messages=ASKED, max_tokens=1)
    assert raised.value.code == "model_not_found" and MODEL in raised.value.message
    assert [model.id for model in client.models.list()] == [MODEL, "gpt-4o-mini"]
    assert client.models.retrieve(MODEL).id == MODEL


def test_statuses_of_http(server: RunningServer, client: openai.OpenAI) -> None:
    auth = {"Authorization": f"Bearer {KEYS['bert']}"}
    other = server.client.get("/v1/chat/completions", headers=auth)
    assert (other.status_code, other.headers["allow"]) == (405, "POST") and other.json()["error"]["message"]
    assert server.client.post("/health").status_code == 405
    for path in (
        "/v1/nothing",
        "/nothing",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
    ):
        found = server.client.get(path, headers=auth)
        assert found.status_code == 404 and found.json()["error"]["code"] == "not_found", path
    large = ask(server, "/v1/completions", b" " * ((8 << 20) + 1))
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"

    def parts() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * (1 << 20)

    try:
        found = server.client.post("/v1/completions", content=parts(), headers=auth)
        assert found.status_code == 413
    except httpx2.TransportError:
        pass  # it was closed while we sent
    assert server.client.get("/").headers["content-type"].startswith("text/html")
    assert server.client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]


def test_keys(server: RunningServer, client: openai.OpenAI) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for key in ("-", "wrong", KEYS["anna"] + "x", KEYS["anna"][:-1], "anna"):
        found = ask(server, "/v1/completions", body, key)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/cluster", "/v1", "/v1/"):
        assert server.client.get(path).status_code == 401, path
    found = server.client.post("/v1/completions", json=body, headers={"x-api-key": KEYS["bert"]})
    assert found.status_code == 200
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_prefixes_are_shared_within_one_key_alone(server: RunningServer, client: openai.OpenAI) -> None:
    text = "The seven seas are wide and deep, and ships go over them. " * 12

    def cached(key: str) -> int:
        found = ask(server, "/v1/completions", {"prompt": text, "max_tokens": 1}, key).json()
        return found["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEYS["anna"]) == 0
    again = cached(KEYS["anna"])
    assert again >= 64 and cached(KEYS["bert"]) == 0 and cached(KEYS["bert"]) == again


def test_pages_of_other_sites_are_refused(server: RunningServer, client: openai.OpenAI) -> None:
    port = server.url.rpartition(":")[2]
    body = {"prompt": "a", "max_tokens": 1}
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.evil"):
        found = ask(server, "/v1/completions", body, headers={"Host": host})
        assert found.status_code in (400, 403), host
    for host in ("localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "127.0.0.1:1"):
        assert ask(server, "/v1/completions", body, headers={"Host": host}).status_code == 200, host
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{int(port) + 1}"):
        found = ask(server, "/v1/completions", body, headers={"Origin": origin})
        assert found.status_code == 403 and found.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in found.headers
    assert ask(server, "/v1/completions", body, headers={"Origin": server.url}).status_code == 200


def test_who_goes_away_makes_room(server: RunningServer, client: openai.OpenAI) -> None:
    """A sequence of a client that has gone is free in that step; whether it streams, or waits for the whole."""
    until_idle(server)
    stream = client.chat.completions.create(model=MODEL, messages=LONG, max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(httpx2.TimeoutException):
        endless = {"messages": LONG, "max_tokens": 900, "logit_bias": {"0": -100, "2": -100}}  # the ends of an answer
        ask(server, "/v1/chat/completions", endless, timeout=0.5)
    until = time.monotonic() + 30
    while not figures(server)["ranks"]:  # which come once it is noticed, if none came before
        assert time.monotonic() < until
        time.sleep(0.05)
    until_idle(server)
    text = server.client.get("/metrics", headers={"x-api-key": KEYS["anna"]}).text
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert counts["tpimpi_requests_cancelled_total"] >= 2
    assert counts["tpimpi_running"] == counts["tpimpi_waiting"] == 0
    assert counts["tpimpi_tokens_total"] < 2 * 900
    assert 0.5 * counts["tpimpi_tokens_drafted_total"] < counts["tpimpi_tokens_accepted_total"]
    assert counts["tpimpi_audits_total"] > 0
    assert counts['tpimpi_requests_total{path="/v1/chat/completions",status="200"}'] > 0
    assert {rank["rank"] for rank in figures(server)["ranks"]} == {0, 1}


def test_a_full_queue_says_so(server: RunningServer, client: openai.OpenAI) -> None:
    until_idle(server)
    streams = [
        client.chat.completions.create(model=MODEL, messages=LONG, max_tokens=900, stream=True) for _ in range(TOGETHER)
    ]
    waiting: list[threading.Thread] = []
    body = {"messages": LONG, "max_tokens": 1}
    for _ in range(QUEUE):
        waiting.append(threading.Thread(target=lambda: ask(server, "/v1/chat/completions", body)))
        waiting[-1].start()
    until = time.monotonic() + 30
    while figures(server)["waiting"] < QUEUE:
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1)
    assert raised.value.code == "queue_full" and int(raised.value.response.headers["retry-after"]) > 0
    for stream in streams:
        stream.close()
    for thread in waiting:
        thread.join()
    assert client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1).choices


def test_one_that_sends_half_a_request_holds_up_nobody(server: RunningServer, client: openai.OpenAI) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as half, socket.create_connection((host, int(port))) as odd:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthor")
        odd.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
        answer = b"".join(iter(lambda: odd.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 400") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
