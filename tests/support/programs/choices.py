"""Run on every rank: what a rank says that chose other experts than rank 0. Argument: a folder of a mixture's slices."""

from __future__ import annotations

import sys

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.engine.startup import open_engine
from tpimpi.errors import StarError
from tpimpi.star import connect


def main() -> None:
    star = connect()
    settings = EngineConfig(
        *(sys.argv[1], None, "", "", "", "native", 1, "star", 60.0),
        cores_shared_by=[star.rank.size] * star.rank.size,
        window="all",
    )
    memory = MemoryPlanner([open_engine(star, settings)]).plan(64, None, 0).take()
    model = memory.engines[0].model
    if star.rank.is_hub:
        x = np.random.default_rng(0).standard_normal((4, model.config.hidden)).astype(np.float32)
        protocol.begin(model, star, 64)
        protocol.forward(model, star, x, 0)
        protocol.send_header(star, protocol.StepHeader(protocol.Operation.FORWARD, 1, 4, model.routing_hash))
    else:
        assert model.experts is not None
        route, seen = model.experts.route, []

        def wrong(h, layer, start):  # type: ignore[no-untyped-def]
            """As a processor that computes wrongly would: another expert, once."""
            seen.append(layer)
            found = route(h, layer, start)
            if len(seen) == 1:
                model.experts._routing_hash.update(b"another")
            return found

        model.experts.route = wrong
        try:
            protocol.follow([model], star)
        except StarError as error:
            assert "chose other experts than rank 0" in str(error), error
            print("all well", flush=True)
        else:
            raise AssertionError("nobody noticed")
    memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
