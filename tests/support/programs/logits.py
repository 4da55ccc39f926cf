"""Run on every rank: logits of models, in one launch for many. Arguments: a JSON file of jobs, and where to write.

A job: {"name", "slices", "ids", "chunks": positions of each forward, "allreduce", "wire", "kv", "kernels": each rank's
level, "predict", and one of "window" and "pins":
the part of the tiles, 0 to 1, that the memory has room to pin beyond the least that works}. Rank 0 writes the logits of
every position, [len(ids), vocab], as NAME.npy, or of those from "logits_from" on, where a chunk begins; every rank writes a
digest of its hidden vectors as NAME-rankR.txt.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.engine.startup import open_engine
from tpimpi.star import connect


def main() -> None:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    star = connect()
    for job in jobs:
        settings = EngineConfig(
            folder=job["slices"],
            cache_name=None,
            fingerprint="",
            shares="",
            format="",
            backend=job.get("backend", "torch"),
            window=None if "pins" in job else job.get("window", "all"),
            memory=[0] * star.rank.size if "pins" in job else None,
            threads=1,
            allreduce=job.get("allreduce", "star"),
            timeout=120.0,
            kv_format=job.get("kv", "auto"),
            wire=job.get("wire", "f32"),
            kernels=job["kernels"][star.rank.index] if "kernels" in job else "auto",
            chunk=job.get("chunk"),
            predict=job.get("predict"),
            cores_shared_by=[star.rank.size] * star.rank.size,
        )
        memory_needs = MemoryPlanner([open_engine(star, settings)])
        needs = memory_needs.needs(len(job["ids"]))
        plan = memory_needs.plan(
            len(job["ids"]), int(needs.least + job["pins"] * (needs.most - needs.least)) if "pins" in job else None, 0
        )
        memory = plan.take()
        engine = memory.engines[0]
        engine.model.begin(len(job["ids"]))
        position, logits, digest = 0, [], hashlib.sha256()
        for count in job["chunks"]:
            ids = job["ids"][position : position + count]
            hidden_size = engine.opened.header.config.hidden
            x = engine.embed(ids) if star.rank.is_hub else np.empty((count, hidden_size), np.float32)
            star.broadcast(x)
            hidden = engine.model.forward(x, position)
            digest.update(hidden.tobytes())
            if star.rank.is_hub and job.get("head", True) and position >= job.get("logits_from", 0):
                logits.append(engine.model.logits(hidden))
            position += count
        memory.close()
        if star.rank.is_hub and logits:
            np.save(out / f"{job['name']}.npy", np.concatenate(logits))
        (out / f"{job['name']}-rank{star.rank.index}.txt").write_text(digest.hexdigest())


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
