"""How a server ends: told to, or because a process of it has died. Clients are told, and nothing is left."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from tests.support.launch import Launcher
from tests.support.servers import RunningServer

ASKED = [{"role": "user", "content": "Write a very long story about a castle."}]
ENDLESS = 8000  # tokens

Start = Callable[..., RunningServer]


@pytest.fixture
def start(mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path) -> Iterator[Start]:
    running: list[RunningServer] = []

    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # the path of a socket has 107 bytes at most

    def started(*options: str) -> RunningServer:
        env = {**cache, "TMPDIR": str(temporary)}
        running.append(RunningServer(mpirun, 2, tmp_path / "log", "--model", str(smollm2), *options, env=env))
        running[-1].until_ready()
        return running[-1]

    yield started
    for one in running:
        one.close()
    left = list(temporary.glob("tpimpi-*"))
    shutil.rmtree(temporary)
    assert not left


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as found:
        yield found


def streaming(server: RunningServer, pool: ThreadPoolExecutor, tokens: int) -> Future[str]:
    """A request that has its first words; its result is why it ended."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    stream = iter(
        client.chat.completions.create(model="", messages=ASKED, max_tokens=tokens, temperature=0, stream=True)
    )
    next(stream), next(stream)

    def rest() -> str:
        try:
            return [chunk.choices[0].finish_reason for chunk in stream][-1] or ""
        except openai.APIError as error:
            return error.message

    return pool.submit(rest)


def assert_nothing_is_left(server: RunningServer, processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, server.said()


@pytest.mark.parametrize("whom", ["rank 0", "the launcher"])
@pytest.mark.slow_but("rank 0")
def test_it_finishes_what_is_under_way(start: Start, pool: ThreadPoolExecutor, whom: str, mpirun: Launcher) -> None:
    """Of two answers the second would take too long: a second signal ends it. Launchers pass SIGUSR1 on."""
    server = start("--grace", "100", "--parallel", "2")
    processes = server.processes()
    endless, short = streaming(server, pool, ENDLESS), streaming(server, pool, 50)
    number = signal.SIGTERM if whom == "rank 0" else signal.SIGUSR1
    told = server.rank(0) if whom == "rank 0" else psutil.Process(server.process.pid)
    told.send_signal(number)
    assert short.result() == "length"
    found = server.client.get("/health")
    assert found.status_code == 503 and found.json()["status"] == "ending"
    refused = server.client.post("/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_ending"
    assert not endless.done()
    told.send_signal(number)
    assert endless.result() == "the server is ending"
    assert server.wait() == 0, server.said()
    assert_nothing_is_left(server, processes)


def test_a_rank_that_dies_is_named(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start()
    processes, rank = server.processes(), server.rank(1)
    endless = streaming(server, pool, ENDLESS)
    rank.kill()
    assert "r1 " in endless.result() and "died" in endless.result()
    assert server.wait() != 0
    assert_nothing_is_left(server, processes)


def test_without_its_front_a_server_ends(start: Start) -> None:
    server = start()
    processes = server.processes()
    (front,) = (one for one in processes if "tpimpi.serving.server.front" in one.cmdline())
    front.kill()
    assert server.wait() != 0
    assert "the HTTP front has ended" in server.said()
    assert_nothing_is_left(server, processes)


def test_a_rank_0_that_is_killed_leaves_no_front(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start()
    processes, endless = server.processes(), streaming(server, pool, ENDLESS)
    server.rank(0).kill()
    assert "rank 0 is gone" in endless.result()
    assert server.wait() != 0
    assert_nothing_is_left(server, processes)
