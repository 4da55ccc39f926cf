"""Run on every rank: a sequence goes on from the first positions of the one before, with the numbers of a whole one.

Arguments: a folder of slices; the least context for which rotary angles are others, 0 where there is none.
"""

from __future__ import annotations

import sys

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.model import Model
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.errors import StarError
from tpimpi.star import Star, connect


def main() -> None:
    star = connect()
    settings = EngineConfig(
        *(sys.argv[1], None, "", "", "", "native", 1, "star", 60.0),
        cores_shared_by=[star.rank.size] * star.rank.size,
        window="all",
    )
    memory = MemoryPlanner([open_engine(star, settings)]).plan(64, None, 0).take()
    engine = memory.engines[0]
    model, others_from = engine.model, int(sys.argv[2])
    if not star.rank.is_hub:
        try:
            protocol.follow([model], star)
        except StarError as error:
            assert "keeps 41 positions" in str(error), error
        memory.close()
        return

    def computed(ids: list[int], start: int) -> bytes:
        return protocol.forward(model, star, engine.embed(ids[start:]), start).tobytes()

    ids = np.random.default_rng(0).integers(3, model.config.vocab, 40).tolist()
    other = [*ids[:12], *ids[30:], *ids[12:22]]
    assert model.max_kept(64) == 0
    protocol.begin(model, star, 30)
    computed(ids[:30], 0)
    assert (model.max_kept(30), model.max_kept(20)) == (30, 20)
    if others_from:
        assert (model.max_kept(others_from - 1), model.max_kept(others_from)) == (30, 0)
        return end(star, model, memory)
    assert model.max_kept(50) == 30
    protocol.begin(model, star, 50, keep=30)  # with room for more
    longer = computed(ids, 30)
    protocol.begin(model, star, 50, keep=12)  # in the same memory
    assert model.max_kept(50) == 12
    another = computed(other, 12)
    protocol.begin(model, star, 32, keep=30)  # with room for less
    shorter = computed(other, 30)
    for found, of, start in ((longer, ids, 30), (another, other, 12), (shorter, other, 30)):
        protocol.begin(model, star, 61)  # so that no number is there from before
        protocol.begin(model, star, 50)
        whole = computed(of, 0)
        assert found == whole[-len(found) :], f"other numbers from position {start} on"
    end(star, model, memory)


def end(star: Star, model: Model, memory: RankMemory) -> None:
    """With what rank 0 must not ask for."""
    print("all well", flush=True)
    protocol.send_header(star, protocol.StepHeader(protocol.Operation.BEGIN, 50, 41, model.routing_hash))
    memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
