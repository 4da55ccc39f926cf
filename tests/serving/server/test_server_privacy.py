"""A server gives nothing away: no text, ids or key of a client is in a message, or outside rank 0 and the front."""

from __future__ import annotations

import json
import pickle
import re
import time
from pathlib import Path

import numpy as np

from tests.support.launch import PROGRAMS, Launcher
from tests.support.privacy import leaks, words_of_steps
from tests.support.servers import RunningServer
from tpimpi.engine.protocol import Operation
from tpimpi.star import CONTROL, PARTIAL

RANKS, TOKENS = 3, 24
PROMPT = "Zanzibar ornithologist whispers quixotic melodies about elderberries."
KEY, OWNER = "sk-Pomegranate-0123456789", "Persimmon"
BODY = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "stop": "Kumquat",
    "logprobs": True,
}


def ask_all(server: RunningServer) -> tuple[set[str], list[int]]:
    """Ask what a client may ask; the words and the ids of it and of an answer."""
    headers = {"Authorization": f"Bearer {KEY}"}

    def post(path: str, body: object) -> dict:
        found = server.client.post(path, json=body, headers=headers)
        assert found.status_code == 200, found.text
        return found.json()

    for n in (1, 2):
        (first, *_) = post("/v1/chat/completions", {**BODY, "n": n})["choices"]
    answer = "".join(one["token"] for one in first["logprobs"]["content"])
    assert answer == first["message"]["content"] and len(first["logprobs"]["content"]) == TOKENS
    ids = [post("/tokenize", {"messages": BODY["messages"]})["tokens"], post("/tokenize", {"prompt": answer})["tokens"]]
    time.sleep(1.1)  # until figures are asked for
    post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
    # Of the answer long pieces: a word of it may be one of ours.
    pieces = {answer[place : place + 12] for place in range(len(answer) - 12)}
    return {*re.findall(r"\w{5,}", f"{PROMPT} {KEY} {OWNER} Kumquat"), *pieces}, [*ids[0], *ids[1]]


def test_a_server_gives_nothing_away(mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{OWNER}={KEY}\n")
    program = (str(PROGRAMS / "recorded_run.py"), str(tmp_path))
    options = (
        "--model",
        str(smollm2),
        "--api-key-file",
        str(tmp_path / "keys"),
        "--memory",
        "400M",
        "--context",
        "256",
    )
    server = RunningServer(mpirun, RANKS, tmp_path / "log", *options, env=cache, program=program)
    try:
        server.until_ready()
        words, ids = ask_all(server)
        outside = [" ".join([*one.cmdline(), *one.environ().values()]) for one in server.processes()]
        assert len(outside) > RANKS + 1, "the front is not there: the test sees nothing"
        server.rank(0).terminate()
        assert server.wait() == 0, server.said()
    finally:
        server.close()
    asked, sums = set(), 0
    for rank in range(RANKS):
        rest, steps = words_of_steps(pickle.loads((tmp_path / f"messages-{rank}.pickle").read_bytes()))
        assert leaks(rest, words, ids) == []
        sums += sum(tag == PARTIAL for _, tag, _ in rest)
        asked |= {operation for operation, _ in steps}
        asked |= {int(np.frombuffer(data, "<i8")[1]) for _, tag, data in rest if tag == CONTROL}
    assert asked >= {Operation.PAGES, Operation.BATCH, Operation.LIVE} and sums > 60 * TOKENS
    for rank in range(1, RANKS):
        seen = json.loads((tmp_path / f"outside-{rank}.json").read_text())
        outside.append(f"{seen['arguments']} {seen['environment']}")
        assert "keys" not in [Path(name).name for name in seen["files"]]
        assert [name for name in seen["modules"] if name.startswith(("tpimpi.serving", "starlette", "uvicorn"))] == []
    assert [word for word in words for one in [*outside, server.said()] if word in one] == []
