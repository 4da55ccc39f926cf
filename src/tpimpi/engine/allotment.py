"""What each rank's memory buys, and the table that says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tpimpi.engine.figures import disk_lines
from tpimpi.system.units import show_size


@dataclass(frozen=True)
class MemoryAllotment:
    """What a rank's memory buys, as it tells rank 0: in bytes, but for `reads` in flight and a rate in bytes a second."""

    rank: int
    host: str
    promise: int | None  # of --memory, or what auto found; None where --window decides
    base: int
    cache: int
    work: int  # with the reserve
    buffers: int
    pinned: int
    streamed: int  # for each token
    reads: int
    disk_bytes_per_s: float  # while the others measured too; 0 where nothing is streamed
    device: int  # st_dev of the slice
    direct: bool  # reads go past the page cache
    max_context: int | None  # positions that the memory has room for, at most
    experts: int = 0  # of a mixture: its cache
    page_units: int | None = None  # pages of one layer that the memory has room for; None: no bound, or no KV heads


def agreed_page_units(ranks: Sequence[MemoryAllotment]) -> int | None:
    """Pages of one layer that every rank has room for, of its own KV heads; None where no rank's memory is bounded."""
    return min((rank.page_units for rank in ranks if rank.page_units is not None), default=None)


def room_lines(ranks: Sequence[MemoryAllotment]) -> list[str]:
    """What to say of how long sequences may become, all together; nothing where no rank's memory is bounded."""
    bounded = [(rank.max_context, f"r{rank.rank} {rank.host}") for rank in ranks if rank.max_context is not None]
    if not bounded:
        return []
    positions, name = min(bounded, key=lambda one: one[0])
    least = f", the least on {name}" if len({room for room, _ in bounded}) > 1 else ""
    return [f"room: keys and values of {positions} positions, if pinned tiles give way{least}"]


def print_memory(ranks: Sequence[MemoryAllotment], *, always: bool) -> None:
    """A table on stderr of what each rank's memory buys; unless `always`, only where something is streamed."""
    from rich.console import Console
    from rich.table import Table

    if not always and not any(rank.streamed for rank in ranks):
        return
    table = Table(box=None, pad_edge=False, header_style="none")
    table.add_column("rank host")
    mixture = any(rank.experts for rank in ranks)
    for name in ("memory", "program", "cache", "work", "buffers", "pinned", *["experts"] * mixture, "streamed a token"):
        table.add_column(name, justify="right")
    for r in ranks:
        sizes = (r.base, r.cache, r.work, r.buffers, r.pinned, *[r.experts] * mixture, r.streamed)
        promise = "-" if r.promise is None else show_size(r.promise)
        table.add_row(f"r{r.rank} {r.host}", promise, *map(show_size, sizes))
    console = Console(file=sys.stderr, width=140, highlight=False, color_system=None)
    console.print(table)
    for line in room_lines(ranks):
        print(line, file=sys.stderr)
    for line in disk_lines([(r.host, r.device, r.streamed, r.disk_bytes_per_s) for r in ranks], alone=True):
        print(f"expected: {line}", file=sys.stderr)
    if any(rank.streamed and not rank.direct for rank in ranks):
        names = ", ".join(f"r{rank.rank} {rank.host}" for rank in ranks if not rank.direct)
        print(f"{names}: this file system has no O_DIRECT, so reads go through the page cache, slower", file=sys.stderr)
    sys.stderr.flush()
