"""Who the ranks are: what each says of itself when a run begins, and what rank 0 remarks on that."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from tpimpi import __version__
from tpimpi.compute.backends import NOT_INSTALLED, has_native
from tpimpi.errors import InputError
from tpimpi.star import Star
from tpimpi.star.control import check_host
from tpimpi.system.launcher import bound_by_launcher

NO_HEARTBEAT = "this MPI has no MPI_THREAD_MULTIPLE, so there is no watch, and a rank that hangs is noticed only after"


@dataclass(frozen=True)
class RankInfo:
    """What a rank says of itself: its host, the cores it may use, how many that host has, whether it has native kernels,
    whether it is the launcher that bound it to its cores, and the number of its process there."""

    host: str
    cores: frozenset[int]
    host_cores: int
    native: bool
    bound_by_launcher: bool = False
    pid: int = 0

    def shares_cores_with(self, other: RankInfo) -> bool:
        return self.host == other.host and bool(self.cores & other.cores)


def options_hash(arguments: Sequence[str]) -> str:
    """What ranks compare in place of their arguments, which no rank sends: a hash of them, in hex."""
    return xxhash.xxh3_128_hexdigest("\0".join(arguments).encode("utf-8", "surrogateescape"))


def gather_hellos(star: Star, arguments: Sequence[str], tasks: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Every rank says who it is. Rank 0 gets what they say in rank order, whatever their versions, the others nothing.

    `arguments` are those of this process, `tasks` those that this rank knows (see tpimpi.cli.follow). Raises InputError
    where ranks were started with different arguments."""
    cores = sorted(os.sched_getaffinity(0))
    about = {"cores": cores, "host_cores": os.cpu_count() or 1, "native": has_native(), "tasks": sorted(tasks)}
    about |= {"bound_by_launcher": bound_by_launcher(), "pid": os.getpid()}
    hello = {"version": __version__, "host": star.rank.host, **about, "options": options_hash(arguments)}
    notes = [json.loads(note) for note in star.gather_notes(json.dumps(hello).encode())]
    if notes:
        star.set_hosts([note["host"] for note in notes])
    for rank, note in enumerate(notes):
        check_host(star, rank, note)
        if note.get("options", notes[0]["options"]) != notes[0]["options"]:  # other versions may not say theirs
            raise InputError(
                f"r{rank} {note['host']} was started with other options than rank 0; give all ranks the same"
            )
    return notes


def gather_rank_infos(star: Star, arguments: Sequence[str], tasks: Iterable[str] = ()) -> list[RankInfo]:
    """Every rank says who it is. Rank 0 gets them in rank order; raises InputError where versions or arguments differ."""
    ranks = []
    for rank, hello in enumerate(gather_hellos(star, arguments, tasks)):
        if hello["version"] != __version__:
            raise InputError(
                f"r{rank} {hello['host']} runs tpimpi {hello['version']}, rank 0 runs {__version__}; "
                "install the same version on every host"
            )
        bound = hello.get("bound_by_launcher", False)
        facts = (hello["host"], frozenset(hello["cores"]), hello["host_cores"], hello["native"], bound)
        ranks.append(RankInfo(*facts, pid=hello.get("pid", 0)))
    return ranks


def cores_shared_by(ranks: Sequence[RankInfo]) -> list[int]:
    """For each rank how many there are on its host that use the same cores, itself among them."""
    return [sum(map(rank.shares_cores_with, ranks)) for rank in ranks]


def bound_to_one_core(ranks: Sequence[RankInfo]) -> str | None:
    """What to tell a user whose launcher gave some ranks a single core each, of several; None where it did not."""
    bound = [
        f"r{index} {rank.host}"
        for index, rank in enumerate(ranks)
        if rank.bound_by_launcher and len(rank.cores) == 1 < rank.host_cores
    ]
    if not bound:
        return None
    return (
        f"{', '.join(bound)}: bound to one core by the launcher, which computing and reading then share; "
        "mpirun --bind-to none frees all of them"
    )


def without_heartbeat(star: Star, timeout: float) -> str | None:
    """What to tell a user whose MPI leaves no thread for the watch; None where there is one."""
    return None if star.has_heartbeat else f"{NO_HEARTBEAT} {timeout:g} s (--timeout)"


def without_native(ranks: Sequence[RankInfo]) -> str | None:
    """What to tell a user of --backend auto where some ranks have no native kernels; None where all do."""
    without = [f"r{index} {rank.host}" for index, rank in enumerate(ranks) if not rank.native]
    slow = "computing with torch, which is slow with quantized weights (--format f32 helps, and takes more memory)"
    return f"{', '.join(without)}: {NOT_INSTALLED}; {slow}" if without else None
