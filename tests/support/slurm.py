"""A real Slurm of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import ROOT, TIMEOUT, Launcher, Result, run_command

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

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


@contextlib.contextmanager
def slurm(mpirun: Launcher, folder: Path) -> Iterator[Cluster]:
    """Started, with its files in `folder`, and stopped again."""
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


def wait_for(
    what: str, reached: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = TIMEOUT
) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process is None or process.poll() is None, f"it ended before: {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)
