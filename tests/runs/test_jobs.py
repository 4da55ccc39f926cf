"""The jobs for Slurm and PBS: for Slurm under a real Slurm of two nodes on this machine, for PBS with stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.support.launch import ROOT, TIMEOUT, Launcher, Result, run_command

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
TALE = ("--format", "f32", "--max-tokens", "48")

# Daemons of root, no accounts, no control groups: what a machine without systemd can do.
CONF = """
ClusterName=test
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def why_not() -> str | None:
    """Why there can be no Slurm here."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (on Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "its daemons are to be started as root"


SUBMIT_FOLDERS = {"slurm": "SLURM_SUBMIT_DIR", "pbs": "PBS_O_WORKDIR"}


@dataclass(frozen=True)
class Cluster:
    """A Slurm of two nodes, n1 and n2, both of them this machine."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str) -> Result:
        return run_command(command, env=self.env, cwd=ROOT)

    def batch(self, out: Path, options: str, *more: str, job: str = "jobs/tpimpi.slurm", **variables: str) -> Result:
        """sbatch of a job, on two nodes with two ranks each; what it says goes to a file job.log in `out`."""
        out.mkdir(exist_ok=True)
        given = {"OUT": str(out), "OPTIONS": options, "BENCHMARKS": "", **variables}
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in given.items())])
        size = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
        try:
            return self.run(
                *("sbatch", "--parsable", *size, f"--output={out}/job.log", f"--export={exported}", *more),
                job,
            )
        except pytest.fail.Exception as error:
            pytest.fail(
                f"{error}\n{self.state()}\n{(out / 'job.log').read_text() if (out / 'job.log').exists() else ''}"
            )

    def state(self) -> str:
        """What Slurm has to say of its jobs, their steps and its nodes."""
        questions = (("squeue", "-l"), ("squeue", "-s"), ("sinfo", "-lN"), ("sinfo", "-R"))
        logs = (self.folder / f"{name}.log" for name in ("slurmctld", "slurmd-n1", "slurmd-n2"))
        return "\n".join(
            [self.run(*question).out for question in questions]
            + [f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-25:]) for log in logs]
        )


@pytest.fixture(scope="module")
def cluster(mpirun: Launcher, cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started, and stopped again."""
    if reason := why_not():
        pytest.skip(f"no Slurm: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    host, config = socket.gethostname().split(".")[0], folder / "slurm.conf"
    # Not 1: MPICH names its shared memory after the job, and what a killed one left there is in its namesake's way.
    first = 1 + secrets.randbelow(10**6)
    config.write_text(CONF.format(host=host, folder=folder, ports=free_ports(3), first=first))
    for name in ("state", "spool-n1", "spool-n2", "local"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-f", str(config)],
        *(["slurmd", "-D", "-N", node, "-f", str(config)] for node in ("n1", "n2")),
    ]
    # As a user's shell would be: in the environment, with what the launcher wants, but no cache folder of its own.
    path = f"{Path(mpirun.program).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"SLURM_CONF": str(config), "TMPDIR": str(folder / "local"), "VIRTUAL_ENV": sys.prefix, "PATH": path}
    # Two nodes share no memory; UCX, which carries MPICH's messages, would find that these do, and use it.
    env = {**mpirun.env, **env, "TPIMPI_CACHE": "", "TPIMPI_MODEL": "", "UCX_TLS": "tcp,self"}
    env["TPIMPI_LINK_KEYS"] = str(folder / "link-keys")  # which a job makes: not in the home folder of who tests
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / "daemons.log").open("ab") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, "SLURM_CONF": str(config)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
            wait_for(f"start of {command[0]}", lambda name=command[0]: is_up(name, folder, env), started[-1])
        cluster = Cluster(folder, env)
        wait_for("nodes", lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D").out.strip() == "2", started[-1])
        yield cluster
    finally:
        if len(started) == len(daemons):
            run_command(["scancel", "--user=root"], env=env)
            with contextlib.suppress(AssertionError):
                idle = ["squeue", "-h"]
                wait_for("end of all jobs", lambda: run_command(idle, env=env).out == "", started[-1], 60)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def is_up(program: str, folder: Path, env: dict[str, str]) -> bool:
    if program == "munged":
        return (folder / "munge.socket").exists()
    return run_command(["scontrol", "ping"], env=env).out.count("UP") > 0


def wait_for(what: str, reached, process: subprocess.Popen[bytes] | None = None, seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process is None or process.poll() is None, f"it ended before: {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


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
