"""Rank 0's planning: what every rank can do, what a number of ranks and their shares would take, and which are best.

`plan` has the first 1, 2, … ranks of the hostfile measured, each number by itself, as ranks on one host take memory
bandwidth and cores from each other. `--shares auto` has all ranks measured once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tpimpi.diagnostics.options import MeasureOptions, PlanOptions, Workload
from tpimpi.diagnostics.planner.costs import LayerCost, LinearCost, Measured, RankSpeed
from tpimpi.diagnostics.planner.hits import HitCurve
from tpimpi.diagnostics.planner.layer_benchmark import LayerBenchmarkConfig
from tpimpi.diagnostics.planner.measure_disks import measure_disks
from tpimpi.diagnostics.planner.measure_layers import RankMeasurement, measure
from tpimpi.diagnostics.planner.predict import Predictor
from tpimpi.diagnostics.planner.prediction import Prediction
from tpimpi.diagnostics.planner.shares import SLICED_SHARES_TOLERANCE, best_shares
from tpimpi.diagnostics.planner.table import PlanRow, advice, print_table, seconds_text, title
from tpimpi.engine.budget import per_rank
from tpimpi.engine.overlap import DENSE_CHUNK
from tpimpi.engine.ranks import RankInfo, cores_shared_by
from tpimpi.errors import InputError
from tpimpi.star import Star
from tpimpi.system.files import write_json
from tpimpi.system.memory import Place
from tpimpi.weights.find import find_slices
from tpimpi.weights.slices.partition import describe_shares


class Survey:
    """The ranks of this run, measured when they are asked about. Raises InputError where --memory has not one size, nor
    one for each rank."""

    def __init__(self, star: Star, infos: Sequence[RankInfo], workload: Workload, measuring: MeasureOptions) -> None:
        self.star, self._infos, self.workload, self._measuring = star, list(infos), workload, measuring
        sizes = workload.memory
        self._memory = None if sizes is None else per_rank(sizes, len(infos))
        self._disks: list[tuple[float, float]] | None = None
        self._hits = HitCurve(workload.config, workload.routing)

    def predictor(self, ranks: int, positions: int = 1) -> Predictor:
        """Measure the first so many ranks, with so many positions of a prompt at once. Raises what measuring raises."""
        workload, infos = self.workload, self._infos[:ranks]
        settings = LayerBenchmarkConfig(
            config=workload.config.to_dict(),
            formats=workload.formats.to_dict(),
            ranks=ranks,
            positions=positions,
            start=workload.prompt,
            cores_shared_by=cores_shared_by(infos),
            kv_format=workload.kv_format,
            memory=self._memory,
            **asdict(self._measuring),
        )
        return Predictor(workload, as_measured(measure(self.star, settings), positions), self._hits)

    def with_disks(self, predictor: Predictor, choose: Callable[[Predictor], list[Prediction]]) -> list[Prediction]:
        """What `choose` finds; where something is streamed in any of it the disks are measured first, once for all, since
        without their rates streaming looks free."""
        found = choose(predictor)
        if not any(any(one.streamed) or any(one.drafted_streamed) for one in found):
            return found
        if self._disks is None:
            self._disks = measure_disks(self.star)
        ranks = tuple(
            replace(speed, disk_bytes_per_s=rate, read_cpu_s_per_byte=cpu)
            for speed, (rate, cpu) in zip(predictor.measured.ranks, self._disks, strict=False)
        )
        return choose(Predictor(self.workload, replace(predictor.measured, ranks=ranks), self._hits))


def as_measured(measurements: Sequence[RankMeasurement], positions: int) -> Measured:
    """What was found, as lines through what was measured. All timings are in the same order, the larger size first.

    In lockstep the rank that computes longest does not wait for others: the rest of its time is two allreduces.
    """
    by_positions = {count: [_timings(measurement, count) for measurement in measurements] for count in {1, positions}}

    def cost(rank: int, count: int) -> LayerCost:
        timings = by_positions[count][rank]
        wall = LinearCost.fit(*((timing.nbytes, timing.compute) for timing in timings))
        return LayerCost(wall, LinearCost.fit(*((timing.nbytes, timing.cpu) for timing in timings)))

    def allreduce(count: int) -> float:
        if len(measurements) == 1:
            return 0.0
        rests = []
        for timings in zip(*by_positions[count], strict=True):
            mean = sum(timing.wall for timing in timings) / len(timings)
            rests.append(max(0.0, mean - max(timing.compute for timing in timings)) / 2)
        return sum(rests) / len(rests)

    ranks = tuple(
        RankSpeed(
            host=measurement.host,
            token=cost(rank, 1),
            chunk=cost(rank, positions),
            processors=measurement.processors,
            base=measurement.base,
            places=tuple(Place(*place) for place in measurement.places),
            threads=measurement.threads,
            backend=measurement.backend,
        )
        for rank, measurement in enumerate(measurements)
    )
    assert measurements[0].head is not None
    nbytes, seconds, cpu = measurements[0].head
    return Measured(
        ranks=ranks,
        positions=positions,
        allreduce_s=allreduce(1),
        allreduce_chunk_s=allreduce(positions),
        head=LinearCost(0.0, seconds / nbytes),
        head_cpu=LinearCost(0.0, cpu / nbytes),
        allreduce=measurements[0].allreduce,
    )


def _timings(measurement: RankMeasurement, positions: int) -> list[Any]:
    return [timing for timing in measurement.timings if timing.positions == positions]


# --shares auto


def choose_shares(survey: Survey, ranks: int, names: tuple[str, str] | None, *, quiet: bool) -> list[float]:
    """The best shares for all ranks, or shares that are about as good and of which every rank has its slice already, in a
    folder of its cache: `names` are what stands before and after the shares in the folder's name (None: none is looked for).

    Says on stderr what was chosen, unless `quiet`. Raises InputError where no shares can work.
    """
    if ranks == 1:
        return [1.0]
    folders = find_slices(survey.star, *names) if names else []
    sliced = [weights for text in folders if (weights := _weights(text, ranks)) is not None]
    best, equal, *others = survey.with_disks(
        survey.predictor(ranks),
        lambda predictor: [
            best_shares(predictor, ranks),
            *(predictor.predict(weights) for weights in ([1.0] * ranks, *sliced)),
        ],
    )
    if best.problem:
        raise InputError(best.problem)
    as_good = [found for found in others if found.s_per_token <= SLICED_SHARES_TOLERANCE * best.s_per_token]
    chosen = min(as_good, key=lambda found: found.s_per_token, default=best)
    if not quiet:
        here = ", sliced already" if as_good else ""
        other = "" if chosen.shares == equal.shares else f", equal shares {seconds_text(equal.s_per_token)}"
        said = f"shares: {chosen.shares} (auto{here}; predicted {seconds_text(chosen.s_per_token)} s/token{other})"
        print(said, file=sys.stderr, flush=True)
    return [float(number) for number in chosen.shares.split(",")]


def _weights(text: str, ranks: int) -> list[float] | None:
    """The shares that a folder's name holds, "3-2-2-1"; None where it holds something else."""
    try:
        weights = [float(number) for number in text.split("-")]
    except ValueError:
        return None
    same = len(weights) == ranks and describe_shares(weights).replace(",", "-") == text
    return weights if same and all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0 else None


# plan


def plan(
    star: Star,
    infos: Sequence[RankInfo],
    options: PlanOptions,
    name: str,
) -> None:
    """Rank 0 of `plan`: measure, print, and write what is wanted. `name` is the model's. Raises InputError."""
    workload = options.workload
    survey = Survey(star, infos, workload, options.measuring)
    lines = make_table(survey, len(infos), options.shares, quiet=options.quiet)
    print_table(lines, infos, title(workload, name), workload)
    if options.json is not None:
        write_json(options.json, as_json(survey, lines, infos), "--json")


def make_table(survey: Survey, ranks: int, given: Sequence[float] | None, *, quiet: bool) -> list[PlanRow]:
    """For 1 to `ranks` ranks equal and best shares, and for all of them the `given` ones."""
    lines = []
    positions = min(survey.workload.prompt, DENSE_CHUNK)
    for count in range(1, ranks + 1):
        if not quiet:
            print(f"measuring {count} of {ranks} ranks", file=sys.stderr, flush=True)
        wanted = given if count == ranks else None
        equal, best, *more = survey.with_disks(
            survey.predictor(count, positions),
            lambda found, count=count, wanted=wanted: [  # type: ignore[misc]
                found.predict([1.0] * count),
                best_shares(found, count),
                *([] if wanted is None else [found.predict(wanted)]),
            ],
        )
        lines.append(PlanRow(count, "equal", equal))
        if best.shares != equal.shares:
            lines.append(PlanRow(count, "best", best))
        lines += [PlanRow(count, "given", one) for one in more]
    return lines


def as_json(survey: Survey, lines: Sequence[PlanRow], infos: Sequence[RankInfo]) -> dict[str, Any]:
    """What `plan --json` writes: seconds and bytes; null where a plan cannot work."""
    workload = survey.workload

    def finite(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    return {
        "model": workload.config.to_dict(),
        "formats": workload.formats.describe(),
        "context": workload.context,
        "prompt_tokens": workload.prompt,
        "parallel": workload.parallel,
        "accepted": workload.accepted,
        "hosts": [info.host for info in infos],
        "plans": [{"ranks": line.ranks, "kind": line.kind, **finite(asdict(line.prediction))} for line in lines],
        "advice": advice(lines),
    }
