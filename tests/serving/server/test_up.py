"""`up`: a server that is started by itself, and started again when a process of it is lost; its answers go on."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import psutil
import pytest

from bench import home
from tests.support.homes import needs_home, output
from tests.support.launch import TIMEOUT, Launcher, run_command
from tests.support.messages import assert_one_line
from tests.support.servers import RunningServer
from tpimpi.cli import supervisor
from tpimpi.cli.supervisor import RunUnderMpirun, Supervisor
from tpimpi.diagnostics.doctor.host_findings import HostChecks
from tpimpi.errors import InputError
from tpimpi.system.hostfile import Host, read_hostfile
from tpimpi.system.launcher import MPICH, OPEN_MPI
from tpimpi.system.link_keys import MAKE_KEYS
from tpimpi.system.mpirun import mpirun_command, write_hostfile

ASKED = {
    "messages": [{"role": "user", "content": "Tell me of the sea, and of those who live by it."}],
    "max_tokens": 150,
    "temperature": 0,
    "stream": True,
}


@pytest.fixture(scope="module")
def server(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("up")
    (folder / "key").write_text("a passphrase\n")
    (folder / "key").chmod(0o600)
    options = ["--model", str(smollm2), "--format", "f32", "--allreduce", "star", "--speculate", "off", "--quiet"]
    options += ["--journal", str(folder / "journal"), "--journal-key-file", str(folder / "key")]
    running = RunningServer(mpirun, 2, folder / "log", *options, env=cache, up=True)
    yield running
    running.close()


def answer(server: RunningServer, meanwhile: Callable[[], None] = lambda: None, **headers: str) -> tuple[str, str]:
    """The answer and why it ended; `meanwhile` is called once there are some words."""
    text, why, called = "", "", False
    with server.client.stream("POST", "/v1/chat/completions", json=ASKED, headers=headers) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += event["choices"][0]["delta"].get("content") or ""
            why = event["choices"][0]["finish_reason"] or why
            if len(text) > 40 and not called:
                called = True
                meanwhile()
    assert called
    return text, why


@pytest.fixture(scope="module")
def whole(server: RunningServer) -> tuple[str, str]:
    server.until_ready()
    return answer(server)


@pytest.mark.slow_but("rank 1")
@pytest.mark.parametrize("whom", [1, 0], ids=["rank 1", "rank 0"])
def test_an_answer_goes_on_when_a_process_is_killed(server: RunningServer, whole: tuple[str, str], whom: int) -> None:
    starts = server.said().count("tpimpi: ready on localhost")
    before = server.rank(whom).pid
    assert answer(server, server.rank(whom).kill) == whole
    assert whole[1] == "length" and len(whole[0]) > 200
    assert server.said().count("tpimpi: ready on localhost") == starts + 1
    assert server.rank(whom).pid != before


@pytest.mark.slow
def test_another_up_goes_on_where_all_of_one_was_killed(server: RunningServer, whole: tuple[str, str]) -> None:
    """With its journal: the client asks again, and gets the same words from the first on, once and as often as it likes."""
    processes, journal = server.processes(), server.log.parent / "journal"

    def kill() -> None:
        size, deadline = journal.stat().st_size, time.monotonic() + TIMEOUT
        while journal.stat().st_size == size:  # until more of it is written
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for process in processes:
            process.kill()

    key = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
    with pytest.raises(httpx2.TransportError):
        answer(server, kill, **key)
    psutil.wait_procs(processes, timeout=30)
    server.start()
    assert "1 of the requests in it were under way, and go on" in server.said()
    assert answer(server, **key) == whole
    assert answer(server, **key) == whole
    other = server.client.post("/v1/chat/completions", json={**ASKED, "max_tokens": 1}, headers=key)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"


def test_it_ends_when_told_to(server: RunningServer, whole: tuple[str, str]) -> None:
    """What is under way is finished first; nothing is left."""
    processes = server.processes()
    assert answer(server, lambda: server.process.send_signal(signal.SIGTERM)) == whole
    assert server.wait() == 0, server.said()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, server.said()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--hostfile", "none"), r"--hostfile none: No such file"),
        (("--hostfile", "other"), r"192\.0\.2\.1, its first host, is another machine"),
        (("--hostfile", "hosts", "--ranks", "2"), "--ranks is for this machine alone"),
        (("--wake",), "--wake needs --hostfile"),
        (("--ranks", "0"), "--ranks is 0, must be"),
        (("--ssh=-x",), "--ssh is '-x'; give the name or the path of a program"),
        (("--host", "0.0.0.0"), "--host is 0.0.0.0, where other machines can ask, and there is no --api-key-file"),
        (("--prompt", "x"), "unrecognized arguments: --prompt x"),
        (("--front", "x"), "--front is what up gives serve; leave it out"),
        (("--journal", "j"), "--journal has prompts and answers, so it is encrypted; give the file of a passphrase"),
        (("--journal-key-file", "key"), "--journal-key-file is given alone"),
        (("--journal", "hosts", "--journal-key-file", "key"), "--journal hosts is there, and is no journal"),
        (("--journal", "j", "--journal-key-file", "hosts"), "--journal-key-file hosts can be read by others"),
        (("--hostfile", "hosts", "--wake"), "--wake: no line of hosts has the address of a network card"),
    ],
)
@pytest.mark.slow_but(
    "arguments0---hostfile none: No such file",
    "arguments8---front is what up gives serve; leave it out",
    "arguments11---journal hosts is there, and is no journal",
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], line: str, cache: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "other").write_text("192.0.2.1\n")
    (tmp_path / "hosts").write_text("localhost\n")
    (tmp_path / "key").write_text("passphrase\n")
    (tmp_path / "key").chmod(0o600)
    result = run_command(
        [sys.executable, "-m", "tpimpi", "up", *arguments, "--port", "0"], env=cache, cwd=tmp_path, timeout=60
    )
    lines = [one for one in result.our_lines if not one.startswith("tpimpi: http")]
    assert len(lines) == 1 and result.code == 2, result.err
    if "--wake" in arguments or "none" in arguments:  # it does not say that it listens first
        assert result.our_lines == lines
    assert_one_line(type(result)(result.code, result.out, f"{lines[0]}\n"), line)


def test_a_start_that_cannot_be_is_not_tried_again(mpirun: Launcher, cache: dict[str, str], tmp_path: Path) -> None:
    """Rank 0 has said what is wrong."""
    server = RunningServer(mpirun, 2, tmp_path / "log", "--model", "no-model", env=cache, up=True)
    assert server.wait() == 2
    assert server.said().count("no-model") == 1, server.said()


@needs_home
@pytest.mark.alone
@pytest.mark.slow
def test_hosts_without_keys_are_said(mpirun: Launcher) -> None:
    """Before anything is started: this machine's own ends it, another's leaves that out."""
    with home.Home(2) as made:
        (hosts := made.folder / "home.txt").write_text("".join(f"{name}\n" for name in made.names))
        own, others = (Path(made.keys(rank)) for rank in range(2))

        def up() -> list[str]:
            options = ("--hostfile", hosts, "--ssh", made.folder / "agent", "--run-under", made.folder / "rank")
            command = [sys.executable, "-m", "tpimpi", "up", *map(str, options), "--port", "0", "--model", "no-model"]
            result = output(made.start(0, command, env=mpirun.env, text=True, stdout=PIPE, stderr=PIPE))
            assert result.code == 2, result.err
            return [line for line in result.our_lines if not line.startswith("tpimpi: http")]

        remedy = f"keys: none, which a run over several hosts needs; type: {MAKE_KEYS}"
        others.unlink()
        said = up()
        assert said[0] == f"tpimpi: {made.names[1]} is left out: {remedy}" and "no-model" in said[-1]
        own.rename(others)
        assert up() == [f"tpimpi: {made.names[0]} (this machine): {remedy}"]


# Its parts


class Ended:
    """Of a process that has ended: what it said."""

    def __init__(self, *lines: str) -> None:
        self.stdout = [f"{line}\n" for line in lines]


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("r2 pi: the disk is full", "b"),
        ("r0 desk: r1 pi has ended: its process died or was killed; the run ends here", "b"),
        ("r0 desk: r3 mini: no sign of life for 8 s", "c"),
        ("prterun noticed that process rank 3 with PID 7 on node mini exited on signal 9 (Killed).", "c"),
        ("r0 desk: the disk is full", None),
        ("r0 desk: audit: what r1 pi sent into the sum of layer 3 mlp (position 9) is not what its tiles give", "b"),
        (
            "r0 desk: audit: tile layers/0003/mlp/tile-000 of r3 mini gives other numbers there than rank 0 computes",
            "c",
        ),
        ("r1 pi 3 heads", None),  # of a table
        ("r0 desk: r1 pi goes on", None),
        ("r9 none: x", None),
    ],
)
def test_whom_a_run_ends_for(line: str, host: str | None) -> None:
    hosts = [Host("a", "a"), Host("b", "b", 2), Host("c", "c")]
    run = RunUnderMpirun(Ended("r0 desk: loading", line), hosts)  # type: ignore[arg-type]
    run.relay.join()
    found = run.blamed_host
    assert (None if found is None else found.name) == host
    assert run.computes_wrongly == ("audit" in line)


def test_a_machine_of_rank_0_that_computes_wrongly_twice_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Other machines are left out; without this one there is no server, which would find the same again and again."""
    hosts = [Host("a", "a", 2), Host("b", "b")]
    wrong = "r0 a: audit: what r1 a sent into the sum of layer 3 mlp (position 9) is not what its tiles give"
    maybe = "r0 a: audit: what r1 a sent as its part is not the sum: it added wrongly, or r2 b sent it something else"
    lines = [wrong.replace("r1 a", "r2 b"), maybe, maybe, wrong, wrong]
    starts = 0

    def start(*_: object) -> RunUnderMpirun:
        nonlocal starts
        run = RunUnderMpirun(Ended(lines[starts]), hosts, came_at=0.0)  # type: ignore[arg-type]
        run.relay.join()
        starts += 1
        return run

    front = SimpleNamespace(socket="front", folder=tmp_path, states=lambda: threading.Event().wait(TIMEOUT) or [])
    up = Supervisor(cast("Any", None), cast("Any", None), [], cast("Any", front))
    monkeypatch.setattr(supervisor, "call_aside_on_signals", lambda end: None)
    monkeypatch.setattr(up, "_look", lambda first: (None, []))
    monkeypatch.setattr(up, "_start", start)
    monkeypatch.setattr(up, "_until_end", lambda run: 3)
    assert up.run() == InputError.exit_code
    assert starts == len(lines)
    said = capsys.readouterr().err.splitlines()
    assert "b is left out for 10 minutes" in said[1]
    assert said[-1].startswith("tpimpi: audits have found this machine wrong twice in a day")


def test_hosts_on_which_the_launcher_starts_nothing() -> None:
    hosts = [Host("a", "a"), Host("me@b", "b"), Host("c", "c")]
    lines = ("  Local host:    a", "  Remote host:   b", "  Daemon exit status: 1")
    run = RunUnderMpirun(Ended(*lines), hosts)  # type: ignore[arg-type]
    run.relay.join()
    assert run.unreached_hosts == hosts[1:2] and run.blamed_host is None


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH])
def test_hostfiles_are_what_the_launcher_reads(launcher: str, tmp_path: Path) -> None:
    hosts = [Host("desk", "desk", 2), Host("me@pi", "pi")]
    write_hostfile(tmp_path / "hosts", launcher, hosts)
    found = read_hostfile(str(tmp_path / "hosts"))
    assert [(one.name, one.ranks) for one in found] == [("desk", 2), ("me@pi", 1)]
    assert {one.slots for one in found} == {launcher == OPEN_MPI} and found[0].colon == (launcher == MPICH)
    words = mpirun_command("mpirun", launcher, tmp_path / "hosts", 3, "agent", [])
    assert words[-2:] == ["-np", "3"] and "agent" in words


def test_links_within_this_machine_need_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have two names in the hostfile; that of another machine, or --seal on, has its keys looked at."""

    def look(here: bool, *arguments: str) -> list[str]:
        none: dict[str, Any] = {"keys": {"file": "keys"}}
        found = [HostChecks(Host(name, name), here=one, facts=none) for name, one in (("a", True), ("b", here))]
        monkeypatch.setattr(supervisor, "probe_hosts", lambda hostfile, ssh: (None, found))
        options = SimpleNamespace(hostfile="hosts", ssh="ssh", wake=False)
        made = Supervisor(
            cast("Any", options), cast("Any", None), arguments, cast("Any", SimpleNamespace(socket="front"))
        )
        return [one.host.name for one in made._look(first=True)[1]]

    assert look(True) == ["a", "b"] and look(False, "--seal", "off") == ["a", "b"]
    for here, arguments in ((False, ()), (True, ("--seal", "on"))):
        with pytest.raises(InputError, match=r"a \(this machine\): keys: "):
            look(here, *arguments)
