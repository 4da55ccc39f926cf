"""Run on every rank: rows of several sequences in one step, with the numbers of each sequence alone, to the bit.

Arguments: a folder of slices, a seed, the format of the cache, and whether memory is bounded. Sequences come, grow by chunks
and by single rows, share their beginnings, go back to an earlier position, and go, in few pages; rank 0 alone decides.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.allotment import agreed_page_units
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.errors import InputError
from tpimpi.models.kv.cache import KINDS, PAGE, pages_of
from tpimpi.models.kv.pages import PageAllocator, SequencePages, rows_of
from tpimpi.star import Star, connect

CONTEXT, STEPS, PAGES = 200, 60, 9


class Sequence:
    """One sequence: its pages, its ids, and what was computed for each of its positions."""

    def __init__(self, pages: SequencePages, ids: list[int], rows: list[bytes]) -> None:
        self.pages, self.ids, self.rows = pages, ids, rows


def main() -> None:
    star = connect()
    bounded = sys.argv[4] == "bounded"
    memory = take_memory(star, bounded)
    engine = memory.engines[0]
    model = engine.model
    if not star.rank.is_hub:
        protocol.follow([model], star)
        memory.close()
        return
    random = np.random.default_rng(int(sys.argv[2]))
    window = max(model.config.attention_windows)
    kinds = model.kv_shape.kinds
    allocator = PageAllocator.of_layers(kinds, PAGES * len(kinds))
    protocol.open_pages(model, star, CONTEXT, allocator)
    pinned = memory.guard.wanted
    running: list[Sequence] = []
    done: list[Sequence] = []
    most, steps, min_pinned = 0, 0, pinned
    for _ in range(STEPS):
        change(random, running, done, allocator, window, model.config.vocab)
        runs = []
        for one in running:
            n = min(int(random.choice([0, 1, 1, 1, 9, 40])), CONTEXT - len(one.rows))
            if n and one.pages.grow(len(one.rows) + n):
                runs.append((one, n))
        if not runs:
            continue
        rows = rows_of([one.pages for one, _ in runs], [(len(one.rows), n) for one, n in runs])
        ids = [token for one, n in runs for token in one.ids[len(one.rows) : len(one.rows) + n]]
        hidden = protocol.step(model, star, engine.embed(ids), rows)
        at = 0
        for one, n in runs:
            one.rows += [row.tobytes() for row in hidden[at : at + n]]
            at += n
            one.pages.trim()
        most, steps = max(most, len(runs)), steps + 1
        min_pinned = min(min_pinned, memory.guard.wanted)
    for one in running:
        one.pages.close()
    assert allocator.used == 0 and most >= 3 and steps > STEPS // 2, (allocator.used, most, steps)
    assert model.cache is not None and model.cache.filled_bytes
    protocol.release_pages(model, star, [allocator.free_pages(kind) for kind in KINDS])
    assert not model.cache.filled_bytes, "memory is not back to the start"
    if bounded:
        assert min_pinned < pinned, "no pinned tile gave way"
        memory.guard.look(time.monotonic())
        memory.guard.look(time.monotonic() + 10)
        assert memory.guard.wanted >= pinned, "tiles did not come back"
    check_allotment(memory, bounded)
    for one in [*running, *done]:
        if one.rows:
            protocol.begin(model, star, CONTEXT)
            alone = protocol.forward(model, star, engine.embed(one.ids[: len(one.rows)]), 0)
            assert [row.tobytes() for row in alone] == one.rows, "other numbers than alone"
    print("all well", len(done), flush=True)
    protocol.finish(model, star)
    memory.close()


def take_memory(star: Star, bounded: bool) -> RankMemory:
    """For all tiles; where it is bounded, for the pages of all sequences only if tiles give way."""
    settings = EngineConfig(
        *(sys.argv[1], None, "", "", "", "native", 1, "star", 60.0),
        cores_shared_by=[star.rank.size] * star.rank.size,
        window=None if bounded else "all",
        memory=[0] * star.rank.size if bounded else None,
        kv_format=sys.argv[3],
    )
    planner = MemoryPlanner([open_engine(star, settings)])
    needs = planner.needs(CONTEXT)
    # For all tiles and a sequence; and for as many pages as come, if half of the tiles give way.
    pages = PAGES * needs.cache // pages_of(CONTEXT)
    promise = needs.most + needs.usual_buffers + max(0, pages - needs.cache - needs.tiles // 2)
    return planner.plan(CONTEXT, promise if bounded else None, 0).take()


def check_allotment(memory: RankMemory, bounded: bool) -> None:
    """What a rank says it has room for is what it takes, and no more."""
    units, shape = memory.allotment.page_units, memory.engines[0].model.kv_shape
    assert agreed_page_units([replace(memory.allotment, page_units=of) for of in (7, None, 5)]) == 5
    assert agreed_page_units([replace(memory.allotment, page_units=None)]) is None
    if not bounded:
        assert units is None
        return
    assert units is not None and units >= PAGES * len(shape.kinds)
    memory.make_room(CONTEXT, units * shape.unit_bytes - shape.nbytes(CONTEXT))
    try:
        memory.make_room(CONTEXT, (units + 1) * shape.unit_bytes - shape.nbytes(CONTEXT))
    except InputError as error:
        assert "of --memory" in str(error), error
    else:
        raise AssertionError("there was more room than the rank said")


def change(
    random: np.random.Generator,
    running: list[Sequence],
    done: list[Sequence],
    allocator: PageAllocator,
    window: int,
    vocab: int,
) -> None:
    """A sequence comes, goes, or goes back to an earlier position."""
    what = random.integers(6)
    ids = random.integers(3, vocab, CONTEXT).tolist()
    if what < 2 and len(running) < 5:
        running.append(Sequence(SequencePages(allocator, window, kept=4), ids, []))
    elif what == 2 and running and len(running) < 5:  # with the beginning of another
        of = running[int(random.integers(len(running)))]
        pages = len(of.rows) // PAGE
        if pages and of.pages.holds(pages * PAGE):
            kept = pages * PAGE
            running.append(Sequence(of.pages.shared(pages), of.ids[:kept] + ids[kept:], of.rows[:kept]))
    elif what == 3 and running:  # as where a draft is rejected
        one = running[int(random.integers(len(running)))]
        length = max(0, len(one.rows) - int(random.integers(1, 5)))
        if one.pages.holds(length):
            one.pages.truncate(length)
            del one.rows[length:]
            one.ids[length:] = ids[length:]
    elif what == 4 and len(running) > 2:
        one = running.pop(int(random.integers(len(running))))
        one.pages.close()
        done.append(one)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
