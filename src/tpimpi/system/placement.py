"""On which hosts a launcher puts the ranks, and on which it could have put them.

Open MPI starts as many ranks on the first host of a hostfile as that has cores, unless the hostfile has slots or mpirun is
told to go round the hosts. MPICH goes round by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from tpimpi.errors import InputError
from tpimpi.system.hostfile import Host, read_hostfile
from tpimpi.system.launcher import MPICH, OPEN_MPI, launcher_commands

BY_NODE = "--map-by node"
_HOSTFILE = ("hostfile", "machinefile", "f")  # options of the launchers, with one dash or two


def by_node(launcher: str, hosts: Sequence[Host]) -> str:
    """What mpirun of that kind has to be told so that its ranks go round these hosts; "" where they do anyway."""
    return BY_NODE if launcher == OPEN_MPI and len(hosts) > 1 and not _says_how_many(hosts) else ""


def _says_how_many(hosts: Sequence[Host]) -> bool:
    return any(host.slots or host.colon for host in hosts)


def given_hosts(commands: Sequence[tuple[list[str], str]] | None = None) -> list[Host] | None:
    """The hosts of the hostfile that the launcher was given, as it can be seen on its own host, rank 0's: each machine once
    (all names of the loopback are one). None where it was given none, or that cannot be told. `commands` are launchers'
    words, each with the folder that it was started in; usually those above this process."""
    for words, folder in launcher_commands() if commands is None else commands:
        if (name := _hostfile_of(words)) is None:
            continue
        try:
            hosts = read_hostfile(str(Path(folder, name)))
        except InputError:
            return None
        return list({"localhost" if host.is_loopback else host.address: host for host in hosts}.values())
    return None


def _hostfile_of(words: Sequence[str]) -> str | None:
    """The value of --hostfile among the launcher's own words, which end where those of the ranks' program begin."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if PurePath(word).name.startswith("python"):
            break
        option, equals, value = word.partition("=")
        if word.startswith("-") and option.lstrip("-") in _HOSTFILE:
            return value if equals else after or None
    return None


def crowded(launcher: str, machines: Sequence[str], given: Sequence[Host] | None) -> str | None:
    """What to say where ranks share a machine while another has none, as nobody asked for; None where it is not so.

    `machines` is where each rank is, `given` what `given_hosts` found.
    """
    used = len(set(machines))
    if given is None or _says_how_many(given) or used >= min(len(machines), len(given)):
        return None
    remedy = "-ppn 1" if launcher == MPICH else BY_NODE
    return (
        f"{len(machines)} ranks are on {used} of the {len(given)} hosts that mpirun was given, and divide their memory and "
        f"cores; to have a rank on each: mpirun {remedy} …"
    )


def all_on_one(launcher: str, machines: Sequence[str], given: Sequence[Host] | None) -> str | None:
    """What to say where all ranks share a machine, and nobody can tell whether that was meant; None where it is not so."""
    if len(machines) < 2 or len(set(machines)) > 1 or (given is not None and len(given) == 1):
        return None
    remedy = {
        MPICH: "mpirun --hostfile FILE -ppn 1 …",
        "Slurm": "srun --ntasks-per-node=1 …",
    }.get(launcher, f"mpirun --hostfile FILE {BY_NODE} …")
    return f"all {len(machines)} ranks are on this machine; if that was not meant: {remedy}"
