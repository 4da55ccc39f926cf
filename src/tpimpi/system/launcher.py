"""How this process was launched: its rank and its launcher, as the environment and the processes above tell."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import psutil

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prte", "orterun", "srun", "mpiexec.hydra", "ompirun_wrapper")
DAEMONS = ("prted", "orted", "hydra_pmi_proxy")  # the launchers' own, one on each host
_BATCH_STEP = "slurmstepd"  # binds what srun starts; all of a batch job is below it, so it is no daemon to be ended

# Variables by which the launchers tell a process its rank, and how many there are.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE")
_LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PALS_LOCAL_SIZE")  # ranks on this host
# srun without a plugin for MPI sets these alone; they also stand in an interactive allocation, where there is one task.
_SLURM_RANK, _SLURM_SIZE = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"

_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_", "PALS_")  # begin so


def environment_without_launcher() -> dict[str, str]:
    """This process's variables but for the launcher's: what is started with them does not take itself for a rank."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_VARIABLES)}


@dataclass(frozen=True)
class Rank:
    """Which rank this process is, of how many, and on which host."""

    index: int
    size: int
    host: str

    @property
    def is_hub(self) -> bool:
        return self.index == 0

    def __str__(self) -> str:
        return f"r{self.index} {self.host}"


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None


def launched_size() -> int:
    """How many ranks the launcher says it started; 1 where it does not say."""
    said = [size for name in _SIZE_VARIABLES if (size := _number(name)) is not None]
    # mpirun in a job of Slurm starts its daemons by srun, whose count the ranks see too.
    return max(said) if said else _number(_SLURM_SIZE) or 1


def launched_rank() -> int | None:
    """The rank that an MPI launcher gave this process, or None where there is no launcher. Does not start MPI."""
    for name in _RANK_VARIABLES:
        if (rank := _number(name)) is not None:
            return rank
    return _number(_SLURM_RANK) if (_number(_SLURM_SIZE) or 1) > 1 else None


def all_on_this_host() -> bool | None:
    """Whether the launcher started all ranks on this host; None where it does not say. Each rank finds the same."""
    said = [size for name in _LOCAL_SIZE_VARIABLES if (size := _number(name)) is not None]
    if said:  # by several, of which one is of an earlier launch: then it is safe to seal
        return set(said) == {launched_size()}
    nodes = _number("SLURM_STEP_NUM_NODES")
    return None if nodes is None else nodes == 1


OPEN_MPI, MPICH = "Open MPI", "MPICH"


def launcher_kind() -> str:
    """The kind of launcher, as the variables that it set tell; "" where they do not."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return OPEN_MPI
    if "PMI_RANK" in os.environ and ("HYDI_CONTROL_FD" in os.environ or "MPI_LOCALNRANKS" in os.environ):
        return MPICH
    return "Slurm" if "SLURM_PROCID" in os.environ else ""


def _above() -> list[psutil.Process]:
    """The launchers above this process, on this host, the nearest first. Raises psutil.Error."""
    return [process for process in psutil.Process().parents() if process.name() in LAUNCHERS]


def launcher_program() -> str:
    """Path of the launcher above this process; "" where there is none on this host."""
    try:
        above = _above()
        return above[-1].exe() if above else ""
    except psutil.Error:
        return ""


def bound_by_launcher() -> bool:
    """Whether the launcher gave this process fewer cores than it may use itself, on this host."""
    settings = ("PRTE_MCA_hwloc_default_binding_policy", "OMPI_MCA_hwloc_base_binding_policy")
    if any(os.environ.get(name) == "none" for name in settings):
        return False
    try:
        for process in psutil.Process().parents():
            if process.name() not in (*LAUNCHERS, *DAEMONS, _BATCH_STEP):
                continue
            words = process.cmdline()
            unbound = any(
                option.lstrip("-") == "bind-to" and value == "none" for option, value in itertools.pairwise(words)
            )
            return not unbound and set(process.cpu_affinity()) > os.sched_getaffinity(0)
    except psutil.Error:
        pass
    return False


def launcher_commands() -> list[tuple[list[str], str]]:
    """The launchers above this process, on this host, the nearest first: the words of each, and the folder it is in."""
    try:
        return [(process.cmdline(), process.cwd()) for process in _above()]
    except psutil.Error:
        return []
