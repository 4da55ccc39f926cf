"""bench/experiments run in earnest, in small."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from bench.experiments import emulation
from tests.support.experiments import run
from tests.support.homes import needs_home
from tests.support.launch import ROOT, TIMEOUT, Launcher

pytestmark = pytest.mark.alone


@needs_home
@pytest.mark.slow
def test_what_a_link_carries_is_measured_with_both_ends_served() -> None:
    wished = 12_500_000
    with emulation.Home(2, emulation.Link(0.001, 0.0, wished)) as home:
        # A full frame has 1514 bytes, of which 1448 are the program's; on a busy machine the clock may start late.
        assert 0.5 < emulation.stream_rate(home) / wished < 1.3


@needs_home
@pytest.mark.slow
def test_a_row_is_run_once_and_its_slices_are_removed(tmp_path: Path) -> None:
    common = ("devices", "--smallest", "--results", tmp_path / "results.jsonl", "--work", tmp_path / "work")
    done = run("run", *common)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["settings"]["devices"] for line in lines] == [1, 2]
    for line in lines:
        figures = line["figures"]
        assert figures["s_per_token"] > 0 and figures["ttft_s"] > 0 and figures["limit_hits"] == 0
        assert len(figures["group_peak_bytes"]) == line["settings"]["devices"]
        assert max(figures["group_peak_bytes"]) <= 300 << 20
    assert not list((tmp_path / "work" / "tpimpi-models").iterdir())
    again = run("run", *common)
    assert again.returncode == 0 and "2 rows are done" in again.stderr
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert run("list", *common).stdout.count(": done\n") == 2
    lines = [json.dumps({**line, "commit": "0123456789"}) + "\n" for line in lines]
    (tmp_path / "results.jsonl").write_text("".join(lines))
    assert run("list", *common).stdout.count(": done\n") == 0
    assert run("list", *common, "--missing").stdout.count(": done\n") == 2


@pytest.mark.mpi
@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.slow
def test_a_row_that_failed_is_tried_once_more(mpirun: Launcher, tmp_path: Path, failures: int) -> None:
    starts = tmp_path / "starts"
    launcher = tmp_path / "launcher"
    real = shlex.join(["env", *(f"{name}={value}" for name, value in mpirun.env.items()), mpirun.program])
    launcher.write_text(
        f"#!/bin/sh\necho >>{starts}\n"
        f"if [ $(wc -l <{starts}) -le {failures} ]; then echo no ranks >&2; exit 134; fi\n"
        f'exec {real} --hostfile {mpirun.hostfile} -np "$@"\n'
    )
    launcher.chmod(0o755)
    results = tmp_path / "results.jsonl"
    common = ("--results", results, "--work", tmp_path / "work", "--only", "measure=allreduce")
    done = run("run", "network", "--smallest", *common, "--launch", f"{launcher} {{ranks}}", "--ranks", "2")
    assert "no ranks; once more" in done.stderr
    assert ("1 of 1 rows failed" in done.stderr) == (failures == 2)
    lines = results.read_text().splitlines()
    assert (done.returncode, len(lines)) == ((0, 1) if failures == 1 else (1, 0))


@pytest.mark.parametrize(
    ("number", "code", "starter"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, ()),
        (signal.SIGINT, 130, ()),
        (signal.SIGINT, 130, ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")),  # as a script's shell starts `command &`
    ],
    ids=["terminated", "interrupted", "interrupted in the background"],
)
@pytest.mark.slow
def test_what_a_launcher_started_ends_with_the_run(
    tmp_path: Path, number: int, code: int, starter: tuple[str, ...]
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\nsleep 0.5\necho $$ >{tmp_path}/pid\nexec sleep 300\n")
    launcher.chmod(0o755)
    models = tmp_path / "work" / "tpimpi-models"
    models.mkdir(parents=True)
    with (models / "weights").open("w") as file:
        file.truncate(2_540_000_000)  # of an earlier row, say
    common = ("--results", str(tmp_path / "results.jsonl"), "--work", str(tmp_path / "work"), "--keep")
    command = [*starter, sys.executable, "-m", "bench.experiments", "run", "network", "--smallest", *common]
    command += ["--only", "measure=allreduce", "--launch", f"{launcher} {{ranks}}", "--ranks", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code
    assert said.splitlines()[-1].startswith(
        "experiments: interrupted; what is done is kept, and the same command goes on; "
    )
    assert f"{models} has 2.5 GB of slices and models" in said.splitlines()[-1]
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"lock", "tpimpi-models"}


@pytest.mark.slow
def test_two_runs_do_not_measure_each_other(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with FileLock(work / "lock"):
        done = run("run", "formats", "--smallest", "--results", tmp_path / "results.jsonl", "--work", work)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"experiments: another run is at work in {work}")
    assert not (tmp_path / "results.jsonl").exists()


def test_without_root_or_a_launcher_one_line_says_what_to_do(tmp_path: Path) -> None:
    program = (
        "import os, sys; os.geteuid = lambda: 1000; from bench.experiments.command import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "run",
        "--results",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, env={}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("experiments: emulated homes need root")
    assert done.stderr.count("\n") == 1
