"""The slices in the cache, as a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tpimpi.errors import printable
from tpimpi.system.terminal import print_table
from tpimpi.system.units import show_size
from tpimpi.weights.cache import CachedSlices


def print_cache(folder: Path, found: Sequence[CachedSlices]) -> None:
    """The table, on stdout: of the folder, with how much it takes."""
    total = show_size(sum(slices.nbytes for slices in found))
    print(f"{folder}: {total} in {len(found)} set{'' if len(found) == 1 else 's'} of slices ($TPIMPI_CACHE chooses it)")
    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="none")
    for name in ("name", "model", "slices", "shares", "format"):
        table.add_column(name, overflow="fold" if name == "name" else "ellipsis")
    for name in ("size", "last used"):
        table.add_column(name, justify="right", no_wrap=True)
    for slices in found:
        here = f"{slices.slices} of {slices.ranks}" if slices.ranks else "unfinished" if not slices.slices else "broken"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(slices.last_used))
        table.add_row(
            *(printable(text) for text in (slices.name, slices.model, here, slices.shares, slices.format)),
            *(show_size(slices.nbytes), when),
        )
    print_table(table, 160)
