"""The jobs for Slurm and PBS: for Slurm under a real Slurm of two nodes on this machine, for PBS with stand-ins."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from pathlib import Path

import httpx2
import pytest

from tests.support.launch import ROOT, run_command
from tests.support.slurm import Cluster, wait_for

TALE = ("--format", "f32", "--max-tokens", "48")

SUBMIT_FOLDERS = {"slurm": "SLURM_SUBMIT_DIR", "pbs": "PBS_O_WORKDIR"}


@pytest.fixture(scope="module")
def undisturbed(cache: dict[str, str]) -> str:
    """What one rank answers to the job's own prompt."""
    command = [sys.executable, "-m", "tpimpi", *TALE, "--quiet", "--prompt", "Why is the sky blue?"]
    result = run_command(command, env=cache)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_on_all_nodes_answer_and_every_node_is_measured(
    cluster: Cluster, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cluster.batch(out, " ".join(TALE), "--wait", BENCHMARKS="disk allreduce")
    log = (out / "job.log").read_text()
    assert result.code == 0, (result.err, log)
    assert (out / "answer.txt").read_text() == undisturbed
    assert [line.split()[0] for line in log.splitlines() if re.match(r"r\d ", line)] == ["r0", "r1", "r2", "r3"]
    assert re.search(r"^job: ranks are started with: (srun|mpirun)", log, re.M)
    for node in ("n1", "n2"):
        assert "O_DIRECT" in (out / f"disk.{node}.txt").read_text()
    assert (out / "allreduce.txt").read_text().strip()
    slices = list((cluster.folder / "local").glob("tpimpi-*/*/rank-?-of-4.h5"))
    assert len(slices) == 4, "on what the job says is the machines' own disk"
    assert (out / "session").stat().st_mode & 0o077 == (out / "answer.txt").stat().st_mode & 0o077 == 0
    again = cluster.batch(out, " ".join(TALE), "--wait")
    assert again.code == 0
    assert (out / "session").read_text().count('"prompt"') == 1, "it had its answer"


@pytest.mark.mpi
@pytest.mark.slow
def test_an_interrupted_job_is_gone_on_with(cluster: Cluster, undisturbed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    submitted = cluster.batch(out, " ".join(TALE))
    assert submitted.code == 0, submitted.err
    session, job = out / "session", submitted.out.strip()

    def tokens() -> int:
        return session.read_text().count('"token"') if session.exists() else 0

    wait_for("tokens", lambda: tokens() >= 3)
    assert cluster.run("scancel", job).code == 0
    wait_for("end of the job", lambda: cluster.run("squeue", "-h", "-j", job).out == "")
    made = tokens()
    assert 3 <= made < len(undisturbed) and '"end"' not in session.read_text()
    result = cluster.batch(out, " ".join(TALE), "--wait", "--nodes=1", "--ntasks-per-node=3")
    assert result.code == 0, (out / "job.log").read_text()
    assert (out / "answer.txt").read_text() == undisturbed
    lines = session.read_text().splitlines()
    assert sum("prompt" in json.loads(line) for line in lines) == 1


@pytest.mark.mpi
@pytest.mark.slow
def test_experiments_run_on_the_machines_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    result = cluster.batch(
        out, "", "--wait", job="jobs/bench.slurm", EXPERIMENTS="devices network --smallest", WORK=str(work)
    )
    assert result.code == 0, (out / "job.log").read_text()
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    done = [(row["settings"]["measure"], row["settings"]["devices"]) for row in rows]
    assert sorted(done) == [("allreduce", 2), ("generate", 1), ("generate", 2), ("generate", 2)]
    assert all(row["settings"]["memory"] == "" and row["settings"]["latency"] == "" for row in rows)
    assert "tinyllama-1.1b (2 layers) q4_0" in (out / "page.md").read_text()


@pytest.mark.mpi
@pytest.mark.slow
def test_a_server_runs_in_a_job_until_it_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """Its log says how to reach it; it wants the key that was made, which nobody else can read."""
    keys, log = tmp_path / "keys" / "file", tmp_path / "out" / "job.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"KEYS": str(keys), "PORT": str(port), "LOGIN": "login.site"}
    submitted = cluster.batch(tmp_path / "out", "", job="jobs/serve.slurm", **more)
    assert submitted.code == 0, submitted.err
    url, until = f"http://127.0.0.1:{port}/", time.monotonic() + 120
    while True:
        try:
            if httpx2.get(f"{url}health").status_code == 200:
                break
        except httpx2.TransportError:
            pass
        assert time.monotonic() < until, f"{log.read_text() if log.exists() else ''}\n{cluster.state()}"
        time.sleep(0.2)
    assert re.search(rf"job:   ssh -N -L {port}:127\.0\.0\.1:{port} -J login\.site n[12]\n", log.read_text())
    key = keys.read_text().strip()
    assert len(key) == 48 and keys.stat().st_mode & 0o777 == 0o600
    assert httpx2.get(f"{url}v1/models").status_code == 401
    assert httpx2.get(f"{url}v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    job = submitted.out.strip()
    assert cluster.run("scancel", job).code == 0
    while job in cluster.run("squeue", "--noheader", "--format=%A").out.split():
        assert time.monotonic() < until + 60, cluster.state()
        time.sleep(0.2)


@pytest.mark.parametrize(("code", "page"), [(0, True), (1, True), (2, False), (143, False)])
def test_rows_that_failed_leave_a_page_of_the_others(tmp_path: Path, code: int, page: bool) -> None:
    python = tmp_path / "python"  # stands for the experiments
    python.write_text(f'#!/bin/sh\necho "$3" >>{tmp_path}/calls\n[ "$3" = page ] || exit {code}\n')
    python.chmod(0o755)
    job = f"set -euo pipefail; . jobs/allocation.sh; python={python}; OUT={tmp_path}/out; RANKS=2; LAUNCH=true; experiment"
    result = run_command(["bash", "-c", job], env={}, cwd=ROOT)
    assert result.code == code, result.err
    assert (tmp_path / "calls").read_text().split() == (["run", "page"] if page else ["run"])


@pytest.mark.mpi
@pytest.mark.slow
def test_what_is_wrong_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "python"  # stands for an environment in which ranks do not find each other
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    wrong = [
        ({"MODEL": "/nowhere/model"}, "model not found: /nowhere/model"),
        ({"PROMPT": "/nowhere/prompt"}, "/nowhere/prompt: No such file"),
        ({"LAUNCH": "false", "BENCHMARKS": "disk"}, "== answer: .*failed"),
        ({"PATH": f"{broken.parent}:{cluster.env['PATH']}"}, "none of these starts 4 ranks that find each other"),
    ]
    for number, (variables, said) in enumerate(wrong):
        out = tmp_path / str(number)
        result = cluster.batch(out, "", "--wait", **variables)
        assert result.code != 0
        assert re.search(said, (out / "job.log").read_text()), (out / "job.log").read_text()
        assert not (out / "answer.txt").exists()
        assert "== bench disk" not in (out / "job.log").read_text(), "measured though the ranks did not answer"


@pytest.mark.parametrize(
    ("name", "folder"),
    [(f"{job}.{kind}", folder) for job in ("tpimpi", "bench") for kind, folder in SUBMIT_FOLDERS.items()]
    + [("serve.slurm", SUBMIT_FOLDERS["slurm"])],
)
def test_a_job_that_was_put_in_elsewhere_says_from_where(name: str, folder: str) -> None:
    jobs = ROOT / "jobs"
    result = run_command(("bash", str(jobs / name)), env={folder: str(jobs)}, cwd=jobs)
    assert result.code == 1
    assert "jobs is not the root of the checkout" in result.err and f"jobs/{name}" in result.err


def test_nothing_is_measured_after_an_answer_that_failed(tmp_path: Path) -> None:
    script = """. jobs/allocation.sh
answer() { return 3; }
ranks() { echo measured; }
each_machine_measures() { echo measured; }
answer_and_measure"""
    result = run_command(("bash", "-c", script), env={"OUT": str(tmp_path / "out")}, cwd=ROOT)
    assert result.code == 1 and "nothing is measured" in result.err
    assert "measured\n" not in result.out and not (tmp_path / "out" / "allreduce.txt").exists()


# What a file for Slurm, or for PBS, may say at its head (the manuals of sbatch, and of qsub of OpenPBS)
DIRECTIVES = {
    "tpimpi.slurm": {
        "prefix": "#SBATCH ",
        "forms": r"--(job-name|nodes|ntasks-per-node|cpus-per-task|time|output|open-mode|mem|partition)=\S+|--requeue",
    },
    "tpimpi.pbs": {
        "prefix": "#PBS ",
        "forms": r"-N [A-Za-z][\w+-]{0,14}|-l select=\d+(:\w+=\w+)+|-l place=scatter|-l walltime=\d\d:\d\d:\d\d|-j oe|-r y",
    },
}
DIRECTIVES |= {name.replace("tpimpi", "bench"): forms for name, forms in DIRECTIVES.items()}
DIRECTIVES["serve.slurm"] = DIRECTIVES["tpimpi.slurm"]


@pytest.mark.parametrize("name", DIRECTIVES)
def test_directives_stand_before_the_first_command(name: str) -> None:
    prefix, forms = DIRECTIVES[name]["prefix"], DIRECTIVES[name]["forms"]
    lines = (ROOT / "jobs" / name).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    found = [line.removeprefix(prefix) for line in lines[:first] if line.startswith(prefix)]
    assert len(found) >= 6
    assert not any(line.startswith(prefix) for line in lines[first:])
    for directive in found:
        assert re.fullmatch(forms, directive), directive


@pytest.mark.parametrize("name", ["allocation.sh", "bench.sh", *DIRECTIVES])
def test_the_jobs_are_bash(name: str) -> None:
    result = run_command(["bash", "-n", str(ROOT / "jobs" / name)], env={})
    assert (result.code, result.err) == (0, "")
