"""What the commands take, checked already: no text of the command line is parsed here, and nothing large imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpimpi.compute.experts import RoutingTrace
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats


@dataclass(frozen=True)
class MeasureOptions:
    """How the ranks would compute and add their partial results."""

    backend: str
    threads: int | None  # of each rank; None: its cores, shared among the ranks on its host
    allreduce: str  # "auto", an algorithm, or a rule
    wire: str
    kernels: str = "auto"  # or one of KERNEL_LEVELS


@dataclass(frozen=True)
class PlanOptions:
    """What `plan` takes: one Workload for 1, 2, … ranks."""

    workload: Workload
    measuring: MeasureOptions
    shares: tuple[float, ...] | None = None  # of all ranks, one line more in the table
    json: Path | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Workload:
    """What is to be run: a model, and what bounds its memory."""

    config: ModelConfig
    formats: ModelFormats
    context: int  # positions that there is room for
    prompt: int  # tokens, fewer than the model has positions
    memory: tuple[int, ...] | None = None  # bytes of each rank, or one size for all; None: what each host has free
    kv_format: str = "auto"  # format of the cache of keys and values
    window: int | str | None = None  # blocks in memory, or "all"; None: as `memory` allows
    chunk: int | None = None  # positions of a prompt that are computed at once; None: as in a run
    routing: RoutingTrace | None = None  # of a mixture: which experts are chosen; None: all equally likely
    parallel: int = 1  # sequences that are answered at once, each of `context` positions
    accepted: float | None = None  # part of drafted tokens that are accepted; None: nothing is drafted
    draft: tuple[ModelConfig, ModelFormats] | None = None  # a model that drafts; None: drafts cost nothing


@dataclass(frozen=True)
class DoctorOptions:
    """What `doctor` takes: with `hostfile` it looks at those hosts over ssh, else at the ranks of this run. With `make_keys`
    it makes keys for those hosts, else for this user; with `rotate_keys` also where there are some."""

    hostfile: str | None = None
    ssh: str = "ssh"  # a program that is called as PROGRAM HOST COMMAND
    model: str | None = None  # None: as in a run
    slices: str | None = None  # None: in the cache
    format: str = "auto"
    shares: tuple[float, ...] | None = None  # of the slices, one for each rank; None: they are yet to be chosen
    json: Path | None = None
    make_keys: bool = False
    rotate_keys: bool = False
