"""Run on every rank: steps with audits, in one launch for many models. Arguments: a JSON file of jobs, and where to write.

A job: {"name", "model": None or its folder, "slices", "rate", "chunks": positions of each forward, "kernels": each rank's
level, "wire", "allreduce", "pins": as in logits.py, "fault": of the last rank, "batch": whether rows of two sequences are in
each step}. Rank 0 writes NAME.json: a digest of the hidden vectors, the figures of its audits, and what an audit said.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.studies.audit_ranks import FACTOR, Undo, lies_in_sums, old_kernel, scales_partials
from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import load_quantizer
from tpimpi.engine import protocol
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.model import Model
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.errors import AuditError
from tpimpi.models.kv.pages import PageAllocator, SequencePages, rows_of
from tpimpi.star import PARTIAL, Pending, Star, connect
from tpimpi.star.pieces import PieceChannel
from tpimpi.weights.copies import open_copies

CONTEXT = 128


def adds_wrongly(model: Model) -> Undo:
    """What this rank adds for the others is scaled (in a mesh)."""
    publish = PieceChannel.publish

    def scaled(self: PieceChannel, values: F32, ranks: Sequence[int], tag: int) -> None:
        values *= FACTOR
        publish(self, values, ranks, tag)

    PieceChannel.publish = scaled  # type: ignore[method-assign]
    return lambda: setattr(PieceChannel, "publish", publish)


def lies_to(ranks: Sequence[int]) -> Undo:
    """What this rank sends into the parts of a sum that these ranks add is scaled."""
    send = PieceChannel.send

    def scaled(self: PieceChannel, values: F32, to: int, tag: int) -> Pending:
        return send(self, values * FACTOR if to in ranks and tag == PARTIAL else values, to, tag)

    PieceChannel.send = scaled  # type: ignore[method-assign]
    return lambda: setattr(PieceChannel, "send", send)


FAULTS = {
    "adds": adds_wrongly,
    "hub": lambda model: lies_to([0]),
    "others": lambda model: lies_to(range(1, model.star.rank.size)),
    "sums": lies_in_sums,
    "scaled": scales_partials,
    "kernel": lambda model: old_kernel(model, "f32"),
}


def main() -> None:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    star = connect()
    for job in jobs:
        memory = take_memory(star, job)
        model = memory.engines[0].model
        last = star.rank.index == star.rank.size - 1
        undo = FAULTS[job["fault"]](model) if last and job.get("fault") else lambda: None
        if star.rank.is_hub:
            found = lead(memory, job)
            protocol.finish(model, star)
            (out / f"{job['name']}.json").write_text(json.dumps(found))
        else:
            protocol.follow([model], star)
        undo()
        memory.close()


def take_memory(star: Star, job: dict[str, Any]) -> RankMemory:
    settings = EngineConfig(
        *(job["slices"], None, "", "", "", "native", 1, job.get("allreduce", "star"), 120.0),
        cores_shared_by=[star.rank.size] * star.rank.size,
        window=None if "pins" in job else "all",
        memory=[0] * star.rank.size if "pins" in job else None,
        wire=job.get("wire", "f32"),
        kernels=job["kernels"][star.rank.index] if "kernels" in job else "auto",
        audit=job["rate"],
        kv_format="f32",
    )
    opened = open_engine(star, settings)
    if star.rank.is_hub:
        model = None if job["model"] is None else Path(job["model"])
        opened.copies = open_copies(opened.header, model, Path(job["slices"]), load_quantizer(1))
    planner = MemoryPlanner([opened])
    needs = planner.needs(CONTEXT)
    promise = int(needs.least + job["pins"] * (needs.most - needs.least)) if "pins" in job else None
    return planner.plan(CONTEXT, promise, 0).take()


def lead(memory: RankMemory, job: dict[str, Any]) -> dict[str, Any]:
    model, said, digest = memory.engines[0].model, None, hashlib.sha256()
    random = np.random.default_rng(0)
    steps = batches(memory, random, job) if job.get("batch") else forwards(memory, random, job)
    try:
        for hidden in steps:
            digest.update(hidden.tobytes())
    except AuditError as error:
        said = str(error)
    figures = None if model.auditor is None else asdict(model.auditor.figures)
    return {"digest": digest.hexdigest(), "figures": figures, "said": said}


def forwards(memory: RankMemory, random: np.random.Generator, job: dict[str, Any]):
    """One sequence after another, each in these chunks."""
    engine = memory.engines[0]
    model: Model = engine.model
    for _ in range(job.get("times", 1)):
        protocol.begin(model, model.star, CONTEXT)
        start = 0
        for n in job["chunks"]:
            ids = random.integers(3, model.config.vocab, n).tolist()
            yield protocol.forward(model, model.star, engine.embed(ids), start)
            start += n


def batches(memory: RankMemory, random: np.random.Generator, job: dict[str, Any]):
    """Two sequences, rows of both in each step."""
    engine = memory.engines[0]
    model: Model = engine.model
    kinds = model.kv_shape.kinds
    allocator = PageAllocator.of_layers(kinds, 8 * len(kinds))
    protocol.open_pages(model, model.star, CONTEXT, allocator)
    window = max(model.config.attention_windows)
    sequences, starts = [SequencePages(allocator, window) for _ in range(2)], [0, 0]
    for n in job["chunks"]:
        counts = [n, 1]
        for sequence, start, count in zip(sequences, starts, counts, strict=True):
            assert sequence.grow(start + count)
        rows = rows_of(sequences, list(zip(starts, counts, strict=True)))
        ids = random.integers(3, model.config.vocab, sum(counts)).tolist()
        yield protocol.step(model, model.star, engine.embed(ids), rows)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
        for sequence in sequences:
            sequence.trim()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
