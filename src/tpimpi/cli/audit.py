"""--audit: whether and how often rank 0 checks what other ranks compute, and with which copies of their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tpimpi.cli.options import RunOptions
from tpimpi.compute.backends import load_quantizer
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.ranks import RankInfo
from tpimpi.errors import InputError
from tpimpi.star import IN_RANK_ORDER
from tpimpi.system.launcher import all_on_this_host
from tpimpi.weights.copies import open_copies
from tpimpi.weights.locations import model_path

NO_COPIES = (
    "audits only compare what other ranks compute with what they sent: rank 0 has neither the model's file nor their "
    "slices; give --model beside --slices to check it against the model"
)


def settle_audit(options: RunOptions, ranks: Sequence[RankInfo]) -> float | None:
    """The part of the steps that are audited, as EngineConfig.audit; None for auto.

    Raises InputError where a rate is given, and the run has what cannot be audited.
    """
    given, problem = options.audit, _problem(options, ranks)
    if given is None:
        return 0.0 if problem is not None or all_on_this_host() else None
    if given and problem is not None:
        raise InputError(f"--audit is {given:g}, and {problem}; or leave --audit out")
    return given


def _problem(options: RunOptions, ranks: Sequence[RankInfo]) -> str | None:
    """Why nothing can be audited, and what to do about it; None where it can."""
    allreduce = options.network.allreduce
    if len(ranks) == 1:
        return "there is no other rank whose sums could be audited; start several ranks"
    if allreduce not in ("auto", *IN_RANK_ORDER):
        return (
            f"with --allreduce {allreduce} partials are not added in rank order, so rank 0 cannot tell what their sum "
            f"should be; give --allreduce {' or '.join(IN_RANK_ORDER)}"
        )
    without = [f"r{index} {rank.host}" for index, rank in enumerate(ranks) if not rank.native]
    if options.compute.backend not in ("auto", "native") or without:
        what = f"{', '.join(without)} has no native kernels" if without else f"--backend is {options.compute.backend}"
        return f"{what}, which alone give a row the same bits whatever is beside it; compute with --backend native"
    return None


def open_tile_copies(engine: OpenedEngine, options: RunOptions) -> str | None:
    """Rank 0: have the engine's audits compute with copies of other ranks' tiles. Returns what to say where there are
    none."""
    if not engine.audits:
        return None
    model = options.model.model if options.model.slices is not None else model_path(options.model.model)
    slices = None if options.model.slices is None else Path(options.model.slices)
    path = None if model is None else model_path(str(model))
    engine.copies = open_copies(engine.header, path, slices, load_quantizer(1))
    return NO_COPIES if engine.copies is None else None
