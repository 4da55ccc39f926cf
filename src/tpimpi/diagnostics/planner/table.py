"""What `plan` prints: a table of predictions, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpimpi.diagnostics.options import Workload
from tpimpi.diagnostics.planner.loads import Loads
from tpimpi.diagnostics.planner.prediction import Prediction
from tpimpi.engine.ranks import RankInfo
from tpimpi.models.tensors import expected_tensors, unused_parameters
from tpimpi.system.terminal import print_table as show_table
from tpimpi.system.units import show_size
from tpimpi.weights.slices.partition import make_partition

_FASTER_RATIO = 1.05  # so many times: a number of ranks is said to be faster than another


@dataclass(frozen=True)
class PlanRow:
    """A line of the table."""

    ranks: int
    kind: str  # "equal", "best" or "given"
    prediction: Prediction


def title(workload: Workload, name: str) -> list[str]:
    """What is planned, in lines: the model, what of a mixture a token uses, and how it is taken to choose."""
    positions = f"a prompt of {workload.prompt} tokens, {workload.context} positions"
    lines = [f"{name}, {workload.formats.describe()}; {positions}"]
    config = workload.config
    if config.experts:
        parameters = sum(int(np.prod(shape)) for shape in expected_tensors(config).values())
        active = parameters - unused_parameters(config)
        load = Loads(config, workload.formats).load(make_partition(config, [1.0]).shares[0], 0)
        whole = load.tiles + config.experts * sum(layer.count * layer.expert for layer in load.layers)
        lines.append(
            f"{config.experts} experts a layer, {config.experts_per_token} for a token: "
            f"{active / 1e9:.3g} of {parameters / 1e9:.3g} billion parameters, "
            f"{show_size(load.token)} of {show_size(whole)} of weights"
        )
        how = "all experts are equally likely: the worst case; --routing FILE takes a trace"
        if workload.routing is not None:
            how = f"experts are chosen as in the trace of --routing, {len(workload.routing)} positions"
        lines.append(how)
    return lines


def advice(lines: Sequence[PlanRow]) -> list[str]:
    """What the table says, in words."""
    possible = [line for line in lines if not line.prediction.problem]
    if not possible:
        return []
    most = lines[-1].ranks
    fastest = min(possible, key=lambda line: line.prediction.s_per_token)
    at_most = [line for line in possible if line.ranks == most]
    words = []
    if not at_most:
        words.append(f"{_ranks(most)} cannot work here; use -np {fastest.ranks}")
    elif fastest.ranks < most:
        there = min(line.prediction.s_per_token for line in at_most)
        here = fastest.prediction.s_per_token
        if there > here * _FASTER_RATIO:
            words.append(
                f"{_ranks(fastest.ranks)} {'is' if fastest.ranks == 1 else 'are'} faster than {most} here: "
                f"{seconds_text(here)} against {seconds_text(there)} s/token; use -np {fastest.ranks}"
            )
        else:
            words.append(f"{_ranks(fastest.ranks)} {'is' if fastest.ranks == 1 else 'are'} as fast as {most} here")
    if fastest.kind == "best":
        words.append(f"best for -np {fastest.ranks}: --shares {fastest.prediction.shares}")
    return words


def print_table(lines: Sequence[PlanRow], infos: Sequence[RankInfo], title: Sequence[str], workload: Workload) -> None:
    """The table, on stdout."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="none")
    table.add_column("ranks", justify="right")
    table.add_column("shares")
    mixture = any(line.prediction.experts for line in lines)
    names = ("experts held", "hits", "read a token") if mixture else ("streamed",)
    for name in ("s/token", "first token", "compute", "star", "head", "memory a rank", *names):
        table.add_column(name, justify="right")
    more = [f"{workload.parallel} at once, tokens/s"] if workload.parallel > 1 else []
    more += [] if workload.accepted is None else [f"drafts at {workload.accepted:g}, s/token"]
    for name in more:
        table.add_column(name, justify="right")
    table.add_column("limit")
    for line in lines:
        found = line.prediction
        count = str(line.ranks)
        if found.problem:
            table.add_row(count, found.shares, *["-"] * (6 + len(names) + len(more)), "memory")
            continue
        times = (found.s_per_token, found.first_token_s, found.compute_s, found.star_s, found.head_s)
        memory, streamed = (show_size(size) if size else "-" for size in (max(found.memory), max(found.streamed)))
        cells = [*_experts(found), streamed] if mixture else [streamed]
        if workload.parallel > 1:
            cells.append(seconds_text(found.tokens_per_s) if found.tokens_per_s else "-")
        if workload.accepted is not None:
            cells.append(f"{seconds_text(found.drafted_s_per_token)} ({found.draft or 'none'})")
        table.add_row(count, found.shares, *map(seconds_text, times), memory, *cells, _limit(found, infos))
    for text in title:
        print(text)
    print()
    show_table(table, 150)
    problems = {line.prediction.problem: line.ranks for line in lines if line.prediction.problem}
    for problem, ranks in problems.items():
        print(f"{_ranks(ranks)}: {problem}")
    for text in advice(lines):
        print(text)


def _experts(found: Prediction) -> tuple[str, str]:
    """The part of all experts that is in memory, and of those that a token uses, on the rank where that is least."""
    parts = [(one.held / one.of, one.hits) for one in found.experts if one.of]
    held, hits = min(parts, default=(1.0, 1.0))
    return f"{held:.0%}", f"{hits:.0%}"


def _limit(found: Prediction, infos: Sequence[RankInfo]) -> str:
    where = f"r{found.limit_rank} {infos[found.limit_rank].host}"
    return {
        "star": "star: latency of the network",
        "compute": f"computing of {where}",
        "processor": f"processor share of {where}",
        "disk": f"disk of {where}",
    }[found.limit]


def seconds_text(seconds: float) -> str:
    """Three digits that count: "0.0234", "0.234", "2.34", "23.4"."""
    if not math.isfinite(seconds) or seconds <= 0:
        return "0"
    return f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
