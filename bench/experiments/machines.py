"""Machines that were not measured, described by what their makers and others say, for predictions of `plan`'s arithmetic."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.experiments.rows import Row
from bench.studies.routing_trace import make_trace
from tpimpi.diagnostics.options import Workload
from tpimpi.diagnostics.planner.costs import LayerCost, LinearCost, Measured, RankSpeed
from tpimpi.diagnostics.planner.hits import HitCurve
from tpimpi.diagnostics.planner.predict import Predictor
from tpimpi.diagnostics.planner.shares import best_shares
from tpimpi.models.shapes import load_shape
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star.tuning import max_exchanged
from tpimpi.system.memory import Place

BASE_BYTES = 80_000_000  # of a rank without a model
POSITIONS = 16  # of the prompt
TRACE_POSITIONS = 400


@dataclass(frozen=True)
class Machine:
    """Equal machines: how many, their processors, bytes of memory and of it free, weights that the kernels go through (bytes
    a second; POSITIONS at once take so many times as long), the disk, and the link: seconds one way, bytes a second."""

    count: int
    cores: int
    memory: int
    free: int
    weights_per_s: float
    positions_cost: float
    disk_per_s: float
    latency_s: float
    bandwidth: float
    why: str


MACHINES = {
    "four 8 GB laptops": Machine(
        *(4, 4, 8 * 10**9, 6 * 10**9, 20e9, 4.0, 1.5e9, 2e-3, 37.5e6),
        why="two channels of DDR4-2666 read at 20 GB/s, an NVMe disk of 1.5 GB/s, Wi-Fi of 2 ms one way and 300 Mbit/s",
    ),
    "four 8 GB laptops, wired": Machine(
        *(4, 4, 8 * 10**9, 6 * 10**9, 20e9, 4.0, 1.5e9, 0.3e-3, 118e6),
        why="two channels of DDR4-2666 read at 20 GB/s, an NVMe disk of 1.5 GB/s, gigabit Ethernet of 0.3 ms one way",
    ),
    "eight Raspberry Pi 5": Machine(
        *(8, 4, 8 * 10**9, 7 * 10**9, 8e9, 8.0, 0.4e9, 0.15e-3, 118e6),
        why="LPDDR4X read at 8 GB/s, an NVMe disk on one lane of PCIe 2 with 0.4 GB/s, gigabit Ethernet of 0.15 ms one way",
    ),
    "a Slurm partition of four": Machine(
        *(4, 32, 128 * 10**9, 120 * 10**9, 150e9, 3.0, 2e9, 5e-6, 3e9),
        why="two sockets that read 150 GB/s together, 128 GB of memory, a disk of 2 GB/s, a network of 5 us and 25 Gbit/s",
    ),
}


def predictions(row: Row) -> dict[str, Any]:
    """What is predicted of the row's model on the machines that `program` names, on one of them and on all; of a mixture
    with a made trace of routing, and as `uniform` with all experts equally likely."""
    machine = MACHINES[row.program]
    config = load_shape(row.shape, row.layers or None).config
    memory = None if row.memory_bytes is None else (row.memory_bytes,)
    formats = ModelFormats.for_model(row.format, config)
    workload = Workload(config, formats, row.context, row.prompt, memory=memory)
    if not config.experts:
        return {"assumed": asdict(machine), "ranks": _on_machines(machine, workload)}
    trace = make_trace(config.experts, config.experts_per_token, config.layers, TRACE_POSITIONS, seed=0)
    traced = replace(workload, routing=trace)
    uniform = _on_machines(machine, workload)
    return {"assumed": asdict(machine), "ranks": _on_machines(machine, traced), "uniform": uniform}


def _on_machines(machine: Machine, workload: Workload) -> dict[str, dict[str, Any]]:
    """What is predicted on one machine and on all, by their number."""
    found = {}
    curve = HitCurve(workload.config, workload.routing)
    for ranks in (1, machine.count):
        best = best_shares(Predictor(workload, _measured(machine, ranks, workload.config.hidden), curve), ranks)
        found[str(ranks)] = {
            "s_per_token": best.s_per_token,
            "ttft_s": best.first_token_s,
            "limit": best.limit,
            "memory_bytes": list(best.memory),
            "streamed_bytes_per_token": list(best.streamed),
        }
        if best.experts:
            found[str(ranks)] |= {
                "shares": best.shares,
                "experts_held": [one.held / max(1, one.of) for one in best.experts],
                "hits": [one.hits for one in best.experts],
            }
    return found


def _measured(machine: Machine, ranks: int, hidden: int) -> Measured:
    one = LinearCost(20e-6, 1 / machine.weights_per_s)
    many = LinearCost(20e-6 * POSITIONS, machine.positions_cost / machine.weights_per_s)
    speed = RankSpeed(
        host="",
        token=LayerCost(one, one),
        chunk=LayerCost(many, many),
        processors=machine.cores,
        base=BASE_BYTES,
        places=(Place("", machine.memory, machine.free),),
        threads=machine.cores,
        disk_bytes_per_s=machine.disk_per_s,
    )

    def allreduce(positions: int) -> float:
        # Whichever `auto` would take, by the times in tpimpi.star.allreduce.
        hub = (ranks - 1) * positions * hidden * 4 / machine.bandwidth
        exchange = machine.latency_s + hub if positions * hidden <= max_exchanged(ranks) else math.inf
        return min(2 * machine.latency_s + hub, exchange, 2 * machine.latency_s + 2 / ranks * hub)

    speeds = tuple(replace(speed, host=f"machine {rank}") for rank in range(ranks))
    return Measured(speeds, POSITIONS, allreduce(1), allreduce(POSITIONS), one, one)
