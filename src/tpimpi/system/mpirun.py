"""mpirun as a program that we start: its options and environment for hosts that are known."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpimpi.system.hostfile import Host
from tpimpi.system.launcher import MPICH

# Open MPI else binds each rank to a core of its own, and asks for each of these before it starts ranks for root.
_OPEN_MPI = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
_AS_ROOT = {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}


def write_hostfile(path: Path, launcher: str, hosts: Sequence[Host]) -> None:
    """A hostfile for that launcher alone, with as many ranks on each host as the host has."""
    lines = [f"{one.name}:{one.ranks}" if launcher == MPICH else f"{one.name} slots={one.ranks}" for one in hosts]
    path.write_text("\n".join([*lines, ""]))


def mpirun_command(
    mpirun: str, launcher: str, hostfile: Path, ranks: int, ssh: str, options: Sequence[str]
) -> list[str]:
    """The words before those of the ranks' program. `ssh` reaches other hosts, called as PROGRAM HOST COMMAND; `options`
    are further ones of the launcher."""
    if launcher == MPICH:
        agent = [] if ssh == "ssh" else ["-launcher", "ssh", "-launcher-exec", ssh]
        return [mpirun, *agent, *options, "-f", str(hostfile), "-np", str(ranks)]
    agent = [] if ssh == "ssh" else ["--prtemca", "plm_ssh_agent", ssh]
    return [mpirun, *agent, *options, "--hostfile", str(hostfile), "-np", str(ranks)]


def mpirun_environment(launcher: str) -> Mapping[str, str]:
    """Variables for it, beside those of this process."""
    if launcher == MPICH:
        return {}
    return {**_OPEN_MPI, **(_AS_ROOT if os.geteuid() == 0 else {})}
