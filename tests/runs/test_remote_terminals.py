"""A conversation at a terminal whose run is elsewhere: over ssh, and under Slurm's srun."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.launch import Launcher
from tests.support.slurm import Cluster, free_ports
from tests.support.sshd import sshd
from tests.support.terminal import Screen, terminal
from tpimpi.serving.session import Session

LEAVE = "/help lists commands, Ctrl-C stops an answer, Ctrl-D or /bye leaves\n"
TALK = ("-m", "tpimpi", "--max-tokens", "3000", "--ignore-eos", "--format", "f32")

pytestmark = [pytest.mark.mpi, pytest.mark.slow]


def converse(command: Sequence[str], env: Mapping[str, str], session: Path) -> None:
    """An answer that Ctrl-C stops, a prompt that is edited, one of pasted lines, and Ctrl-D."""
    with terminal(command, {**env, "TERM": "xterm"}) as run:
        before = termios.tcgetattr(run.ours)
        screen = Screen(run)
        screen.until(f"{LEAVE}>")
        begun = len(screen.text)
        run.type("Tell a stry.\x1b[D\x1b[D\x1b[Do\r")  # three to the left, and the letter that is missing
        while len(screen.until("")) < begun + 60:
            time.sleep(0.05)
        run.type("\x03")
        screen.until("\nstopped; what was said is kept, /undo takes it back, /retry answers anew\n>")
        run.type("\x1b[200~the lazy\rdog\x1b[201~")
        screen.until("\n  dog")
        run.type("\x03")  # what is typed goes, and the run goes on
        screen.until("answers anew\n>")
        screen.ask("/stats", what="1 turn; ")
        run.type("\x04")
        assert screen.end() == 0, screen.text
        assert termios.tcgetattr(run.ours) == before, "the terminal is not as it was"
    said = Session(str(session))
    said.close()
    assert [(turn.prompt, turn.ended) for turn in said.turns] == [("Tell a story.", "cancelled")]
    assert 0 < len(said.turns[0].tokens) < 3000


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A real sshd on this machine: the command that logs in there, with a terminal."""
    folder, (port,) = tmp_path_factory.mktemp("ssh"), free_ports(1)
    with sshd(folder, f"ListenAddress 127.0.0.1:{port}\n") as client:
        shutil.copy(folder / "user.pub", folder / "authorized")
        (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
        options = ["-F", "none", "-i", str(folder / "user"), "-o", f"UserKnownHostsFile={folder}/known"]
        yield [client, *options, "-p", str(port), "-tt", "127.0.0.1"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_over_ssh(
    ssh: list[str], mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path, ranks: int
) -> None:
    session = tmp_path / "chat"
    words = [*TALK, "--session", str(session)]
    command = mpirun.command(ranks, words) if ranks > 1 else [sys.executable, *words]
    given = {**mpirun.env, **cache, "TPIMPI_MODEL": str(smollm2)}
    env = ["env", f"PATH={os.environ['PATH']}", *(f"{name}={value}" for name, value in given.items())]
    converse([*ssh, shlex.join([*env, *command])], {}, session)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.any_mpi
def test_under_srun(
    cluster: Cluster, mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path, ranks: int
) -> None:
    """With --pty rank 0 has a terminal, and ranks on two nodes find each other as in a batch job."""
    session = tmp_path / "chat"
    env = {**cluster.env, **cache, "TPIMPI_MODEL": str(smollm2)}
    way = "--mpi=none" if ranks == 1 else "--mpi=pmi2" if mpirun.mpi == "mpich" else "--mpi=pmix"
    command = ["srun", way, f"--nodes={ranks}", f"--ntasks={ranks}"]
    if "Invalid MPI type" in (tried := cluster.run(*command, "true").err):
        pytest.skip(f"Slurm does not start ranks of this MPI here: {tried.splitlines()[0]}")
    converse([*command, "--pty", sys.executable, *TALK, "--seal", "off", "--session", str(session)], env, session)
