"""A server gives nothing away: no text, ids or key of a client is in a message, or outside rank 0 and the front; not in the
memory of other ranks either."""

from __future__ import annotations

import json
import pickle
import platform
import re
import time
from pathlib import Path

import numpy as np

from tests.support.launch import PROGRAMS, Launcher
from tests.support.privacy import RUN, leaks, patterns_of, words_of_steps
from tests.support.processes import Shown, found_in_memory
from tests.support.servers import RunningServer
from tpimpi.engine.protocol import Operation
from tpimpi.star import CONTROL, PARTIAL
from tpimpi.system.link_keys import make_keys, write_keys

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


def ask_all(server: RunningServer) -> tuple[set[str], list[int], str]:
    """Ask what a client may ask; the words and the ids of it and of an answer, and the answer."""
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
    return {*re.findall(r"\w{5,}", f"{PROMPT} {KEY} {OWNER} Kumquat"), *pieces}, [*ids[0], *ids[1]], answer


def look_at_processes(server: RunningServer, words: set[str], ids: list[int]) -> list[str]:
    """What the run's processes show; that there is no text in the memory of ranks other than 0, and that no process
    leaves its memory behind when it crashes."""
    shown = {one.pid: Shown.of(one.pid) for one in server.processes()}
    assert len(shown) > RANKS + 1, "the front is not there: the test sees nothing"
    ranks = [server.rank(rank).pid for rank in range(RANKS)]
    for pid in ranks:
        assert shown[pid].max_core_bytes <= 1
        assert any(name.endswith(".so") for name in shown[pid].maps.split()), "nothing is seen of its memory"
    swap = len(Path("/proc/swaps").read_text().splitlines()) > 1
    assert swap or not any(shown[pid].swapped_bytes for pid in ranks)
    patterns = patterns_of(words, [])
    for run in (ids[start : start + 2 * RUN] for start in range(0, len(ids) - 2 * RUN, 2 * RUN)):
        patterns += [(f"ids {run} as {dtype}", np.array(run, dtype).tobytes()) for dtype in ("<u2", "<i4", "<i8")]
    try:
        for rank, pid in enumerate(ranks):
            found, looked_at = found_in_memory(pid, patterns)
            assert looked_at > 20e6
            if rank:
                assert found == set(), f"rank {rank}"
            else:
                assert any("Zanzibar" in what for what in found), "the search does not find what is there"
    except PermissionError:
        pass  # this user may not look into other processes (kernel.yama.ptrace_scope)
    texts = (
        [one.arguments.decode(errors="replace"), one.environment.decode(errors="replace"), one.maps, *one.files]
        for one in shown.values()
    )
    return [" ".join(text) for text in texts]


def test_a_server_gives_nothing_away(mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{OWNER}={KEY}\n")
    link_keys = make_keys([platform.node(), "elsewhere"], "2026-02-03")[platform.node()]
    env = {**cache, "TPIMPI_LINK_KEYS": str(write_keys(link_keys, tmp_path / "link-keys"))}
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
    server = RunningServer(mpirun, RANKS, tmp_path / "log", *options, env=env, program=program)
    try:
        server.until_ready()
        words, ids, answer = ask_all(server)
        # Without words that are in any Python's memory, of its own texts.
        rare = {word for word in words if word in f"{PROMPT}{KEY}{OWNER}Kumquat" and len(word) > 7 and word.isalpha()}
        rare |= {answer[place : place + 30] for place in range(0, len(answer) - 30, 15)}
        outside = look_at_processes(server, rare, ids)
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
    assert asked >= {Operation.PAGES, Operation.STEP, Operation.LIVE} and sums > 60 * TOKENS
    words |= {link_keys.private}
    for rank in range(1, RANKS):
        seen = json.loads((tmp_path / f"outside-{rank}.json").read_text())
        outside.append(f"{seen['arguments']} {seen['environment']}")
        assert "keys" not in [Path(name).name for name in seen["files"]]
        assert [name for name in seen["modules"] if name.startswith(("tpimpi.serving", "starlette", "uvicorn"))] == []
    assert [word for word in words for one in [*outside, server.said()] if word in one] == []
