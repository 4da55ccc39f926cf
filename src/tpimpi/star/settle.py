"""How a run's ranks settle what the links between them are like, and which allreduce suits them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tpimpi.engine.engine import wire_of
from tpimpi.engine.model import largest_sum
from tpimpi.errors import TpimpiError
from tpimpi.star import Links, Star, choose, describe
from tpimpi.star.control import as_note
from tpimpi.weights.slices.file import SliceFile, slice_name

__all__ = ["AUTO", "TASK", "follow", "hidden_of_slices", "measure_links", "settle_allreduce", "wire_of"]

TASK = "links"
AUTO = "auto"


def measure_links(star: Star, *, wire: str = "f32", largest: int = 0) -> Links:
    """Rank 0: measure the links to the other ranks (see Star.measure_links), which listen for a note."""
    star.tell(as_note(task=TASK, wire=wire))
    star.wire = wire_of(wire)
    return star.measure_links(largest)


def follow(star: Star, note: dict[str, Any]) -> None:
    """Other ranks: their part of that."""
    star.wire = wire_of(note["wire"])
    star.measure_links()


def hidden_of_slices(folder: str, ranks: int) -> int:
    """The hidden size of the model whose slices for so many ranks are there; 0 where they cannot be read."""
    with (
        contextlib.suppress(TpimpiError),
        contextlib.closing(SliceFile(Path(folder) / slice_name(0, ranks))) as file,
    ):
        return file.header.config.hidden
    return 0


def settle_allreduce(star: Star, allreduce: str, wire: str, hidden: int) -> tuple[str, str | None]:
    """Rank 0: the rule by which sums are made for a model of that hidden size (0: not known), and a line that says what was
    chosen, where that was left to us.

    The links' latency is measured in any case, so that waiting suits it on every rank. Raises StarError.
    """
    if star.rank.size == 1:
        return "star" if allreduce == AUTO else allreduce, None
    largest = max(1, largest_sum(hidden, star.rank.size))
    links = measure_links(star, wire=wire, largest=largest if allreduce == AUTO else 0)
    if allreduce != AUTO:
        return allreduce, None
    rule = choose(links.times, star.rank.size)
    return rule, describe(rule, links, star.rank.size)
