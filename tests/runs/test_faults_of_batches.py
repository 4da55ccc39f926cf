"""What happens when a rank dies, or a disk fails, in the middle of a batch: it is named, what was answered stands, and the
same command goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.faults_cases import Running, Runs
from tests.support.launch import run_command

PROMPTS, TOKENS = 24, 30
on_two_ranks = pytest.mark.parametrize("runs", [pytest.param(2, marks=pytest.mark.mpi)], indirect=True)


def batch(runs: Runs, folder: Path, slices: Path) -> list[str]:
    """The command: all tiles are read for each step."""
    lines = [
        {"custom_id": f"q{n}", "prompt": f"{n + 3} 4 5", "max_tokens": 2 + TOKENS * n // PROMPTS}
        for n in range(PROMPTS)
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["-m", "tpimpi", "--slices", str(slices), "--raw", "--ignore-eos", "--quiet", "--window", "2"]
    arguments += ["--batch-file", str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl"), "--parallel", "4"]
    assert runs._launcher is not None
    return runs._launcher.command(runs.ranks, arguments)


def rank_of(process: psutil.Process) -> str | None:
    variables = process.environ()
    return variables.get("OMPI_COMM_WORLD_RANK", variables.get("PMI_RANK"))


@on_two_ranks
@pytest.mark.parametrize("fault", ["a rank dies", "a slice shrinks"])
@pytest.mark.slow_but("a rank dies-2")
def test_a_fault_in_the_middle_of_a_batch(runs: Runs, tmp_path: Path, fault: str) -> None:
    slices, part = tmp_path / "slices", tmp_path / "out.jsonl.part"
    shutil.copytree(runs.slices, slices)
    command = batch(runs, tmp_path, slices)
    running = Running(command, runs.env)
    try:
        deadline = time.monotonic() + 120
        while not (part.exists() and part.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
            assert running.process.poll() is None, running.finish().err
            time.sleep(0.01)
        victim = runs.slice_of_victim(slices)
        if fault == "a rank dies":
            of_launcher = psutil.Process(running.process.pid).children(recursive=True)
            others = [process for process in of_launcher if rank_of(process) == str(runs.victim)]
            pids = "|".join(str(process.pid) for process in of_launcher if rank_of(process) is not None)
            others[-1].send_signal(signal.SIGKILL)
            # Our words, or Open MPI's, or MPICH's, which kills all and knows processes by their numbers: on one host it
            # may name one that it has killed itself (see code_asked_for).
            who = rf"rank 1 .*signal:? 9|r1 |PID ({pids}) RUNNING AT .*signal 9"
        else:
            who = rf"slice file {re.escape(str(victim))} was changed"
            os.truncate(victim, victim.stat().st_size // 2)
        result = running.finish()
    finally:
        running.kill()
    assert result.code != 0 and "Traceback" not in result.err
    said = " ".join(f"{result.out} {result.err}".split())  # MPICH's launcher speaks on stdout
    assert re.search(who, said, re.IGNORECASE), said
    answered = part.read_bytes().count(b"\n") - 1
    assert 3 <= answered < PROMPTS
    shutil.copy(runs.slice_of_victim(runs.slices), victim)
    before = part.read_bytes()
    again = run_command(command, env=runs.env)
    assert again.code == 0, again.err
    answers = (tmp_path / "out.jsonl").read_bytes()
    assert not part.exists() and set(before.splitlines()[1:]) < set(answers.splitlines())
    (tmp_path / "out.jsonl").unlink()
    whole = run_command(command, env=runs.env)
    assert whole.code == 0 and (tmp_path / "out.jsonl").read_bytes() == answers
