"""Run on every rank: one long sequence whose windowed layers have fewer pages than it, with the numbers of one that has all.

Arguments: a folder of slices, and where to keep files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import Engine, EngineConfig
from tpimpi.engine.needs import KEPT_POSITIONS
from tpimpi.engine.page_files import PageFiles
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.engine.startup import open_engine
from tpimpi.errors import StarError
from tpimpi.models.kv.cache import FULL, WINDOWED, pages_of
from tpimpi.models.kv.pages import PageAllocator, SequencePages, rows_of
from tpimpi.serving.kept_cache import KeptCache
from tpimpi.serving.transcript import Turn
from tpimpi.star import connect

CONTEXT, LENGTH, CHUNK = 1900, 1700, 128


def check(engine: Engine, files: PageFiles, folder: Path) -> None:
    model, star = engine.model, engine.model.star
    ids = np.random.default_rng(0).integers(3, model.config.vocab, LENGTH).tolist()
    back = LENGTH - KEPT_POSITIONS + CHUNK
    other = [*ids[:back], *ids[200:600]]

    def computed(ids: list[int], start: int = 0) -> list[bytes]:
        rows: list[bytes] = []
        for first in range(start, len(ids), CHUNK):
            hidden = protocol.forward(model, star, engine.embed(ids[first : first + CHUNK]), first)
            rows += [row.tobytes() for row in hidden]
        return rows

    def with_all_pages(ids: list[int]) -> list[bytes]:
        kinds = model.kv_shape.kinds
        allocator = PageAllocator.of_layers(kinds, pages_of(CONTEXT) * len(kinds))
        protocol.open_pages(model, star, CONTEXT, allocator)
        pages, rows = SequencePages(allocator), list[bytes]()
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first : first + CHUNK]
            assert pages.grow(first + len(chunk))
            step_rows = rows_of([pages], [(first, len(chunk))])
            rows += [row.tobytes() for row in protocol.step(model, star, engine.embed(chunk), step_rows)]
        return rows

    wanted, wanted_then = with_all_pages(ids), with_all_pages(other)
    protocol.begin(model, star, CONTEXT)
    assert model.cache.pages[FULL] == pages_of(CONTEXT) > pages_of(LENGTH) - 3 > model.cache.pages[WINDOWED]
    assert computed(ids) == wanted
    assert (
        model.cache.filled_bytes <= model.kv_shape.nbytes(CONTEXT) < model.kv_shape.nbytes_of([pages_of(CONTEXT)] * 2)
    )
    # Kept and read again, it goes on and goes back as it would have.
    session = SimpleNamespace(path=folder / "session", turns=[Turn("", ids, 0)], passphrase=None, seal=None)
    kept = KeptCache(session)
    assert kept.keep(model, files, ids) is None
    protocol.begin(model, star, CONTEXT)
    computed(other[300:])
    found, problem = KeptCache(session).take(*(model, files, CONTEXT - 70, CONTEXT))
    assert (found, problem) == (ids, None), problem
    longer = [*ids, *other[-20:]]
    protocol.begin(model, star, CONTEXT, keep=LENGTH)
    onward = computed(longer, LENGTH)
    assert model.can_keep(back, CONTEXT) and not model.can_keep(300, CONTEXT)
    protocol.begin(model, star, CONTEXT - 10, keep=back)
    assert computed(other, back) == wanted_then[back:]
    assert onward == with_all_pages(longer)[LENGTH:]


def main() -> None:
    star, folder = connect(), Path(sys.argv[2])
    settings = EngineConfig(
        *(sys.argv[1], None, "", "", "", "native", 1, "star", 60.0),
        cores_shared_by=[star.rank.size] * star.rank.size,
        window="all",
        chunk=CHUNK,
        keep_cache=str(folder / "kept"),
    )
    opened = open_engine(star, settings)
    memory = MemoryPlanner([opened]).plan(CONTEXT, None, 0).take()
    engine = memory.engines[0]
    if star.rank.is_hub:
        check(engine, opened.page_files, folder)
        print("all well", flush=True)
        # What rank 0 must not ask for: positions whose windows are not there.
        protocol.send_header(
            star, protocol.StepHeader(protocol.Operation.BEGIN, CONTEXT, 300, engine.model.routing_hash)
        )
    else:
        try:
            protocol.follow([engine.model], star, opened.page_files)
        except StarError as error:
            assert "keeps 300 positions" in str(error), error
    memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
