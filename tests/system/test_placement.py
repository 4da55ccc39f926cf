"""Where launchers put ranks: what is typed so that they go round the hosts, and what is said where they did not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpimpi.system.hostfile import Host
from tpimpi.system.placement import all_on_one, by_node, crowded, given_hosts

LAPTOP, DESKTOP, PI = (Host(name, name) for name in ("laptop", "desktop", "pi"))
SLOTS = [Host("laptop", "laptop", 4, slots=True), DESKTOP]


def test_only_open_mpi_is_told_to_go_round_the_hosts() -> None:
    assert by_node("Open MPI", [LAPTOP, DESKTOP]) == "--map-by node"
    assert by_node("Open MPI", [LAPTOP]) == ""
    assert by_node("Open MPI", SLOTS) == ""
    assert by_node("MPICH", [LAPTOP, DESKTOP]) == by_node("", [LAPTOP, DESKTOP]) == ""


@pytest.mark.parametrize(
    "words",
    [
        ["mpirun", "-np", "4", "--hostfile", "home.txt", "python", "-m", "tpimpi"],
        ["prterun", "-np", "4", "-machinefile", "home.txt", "/usr/bin/python3.11", "-m", "tpimpi"],
        ["mpiexec.hydra", "-f", "home.txt", "-n", "4", "python"],
        ["mpirun", "--hostfile=home.txt", "python"],
    ],
)
def test_the_hosts_that_a_launcher_was_given(words: list[str], tmp_path: Path) -> None:
    """Relative to the launcher's folder; names of the loopback, and of another user there, are no further machine."""
    (tmp_path / "home.txt").write_text("localhost\n127.0.0.1\nme@pi\npi\n")
    found = given_hosts([(["srun", "mpirun"], "/"), (words, str(tmp_path))])
    assert found is not None and [host.address for host in found] == ["127.0.0.1", "pi"]


@pytest.mark.parametrize(
    "words",
    [
        ["mpirun", "-np", "4", "python", "-m", "tpimpi", "--hostfile", "home.txt"],  # the program's own
        ["mpirun", "--hostfile"],
        ["mpirun", "--hostfile", "none.txt", "python"],
        ["srun", "-n", "4", "python"],
    ],
)
def test_hosts_that_cannot_be_told(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "home.txt").write_text("laptop\npi\n")
    assert given_hosts([(words, str(tmp_path))]) is None
    assert given_hosts([]) is None


def test_ranks_that_share_a_machine_while_another_has_none() -> None:
    three = [LAPTOP, DESKTOP, PI]
    assert crowded("Open MPI", ["a", "a", "a", "a"], three) == (
        "4 ranks are on 1 of the 3 hosts that mpirun was given, and divide their memory and cores; to have a rank on each: "
        "mpirun --map-by node …"
    )
    said = crowded("MPICH", ["a", "a", "b"], three)
    assert said is not None and "3 ranks are on 2 of the 3 hosts" in said and "mpirun -ppn 1 …" in said
    assert crowded("Open MPI", ["a", "b", "c", "a"], three) is None  # no host is without
    assert crowded("Open MPI", ["a", "b"], three) is None  # no two share one
    assert crowded("Open MPI", ["a", "a"], SLOTS) is None  # as the hostfile says
    assert crowded("Open MPI", ["a", "a"], None) is None


def test_all_ranks_on_one_machine_where_nobody_knows_whether_that_was_meant() -> None:
    for given in (None, SLOTS):
        assert all_on_one("Open MPI", ["a", "a"], given) == (
            "all 2 ranks are on this machine; if that was not meant: mpirun --hostfile FILE --map-by node …"
        )
    said = all_on_one("Slurm", ["a", "a"], None)
    assert said is not None and "srun --ntasks-per-node=1" in said
    assert all_on_one("Open MPI", ["a", "a"], [LAPTOP]) is None
    assert all_on_one("Open MPI", ["a"], None) is None
    assert all_on_one("Open MPI", ["a", "b"], None) is None
