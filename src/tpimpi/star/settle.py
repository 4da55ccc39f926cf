"""How a run's ranks settle what the links between them are like, and which allreduce suits them."""

from __future__ import annotations

from tpimpi.errors import InputError
from tpimpi.star import Links, Star, choose, describe
from tpimpi.star.codec import wire_of
from tpimpi.star.control import Task, TaskNote, send_note

TASK = "links"
AUTO = "auto"


class MeasureLinks(TaskNote, tag=TASK, frozen=True):
    """Hub: the links are measured now, with the wire that `--wire` names."""

    wire: str


def measure_links(star: Star, *, wire: str = "f32", largest: int = 0) -> Links:
    """Rank 0: measure the links to the other ranks (see Star.measure_links), which listen for a note."""
    send_note(star, MeasureLinks(wire))
    star.wire = wire_of(wire)
    return star.measure_links(largest)


def follow(star: Star, task: Task) -> None:
    """Other ranks: their part of that."""
    star.wire = wire_of(task.note(MeasureLinks).wire)
    star.measure_links()


def check_sealed(star: Star, allreduce: str) -> None:
    """Raises InputError where sums go by a way that cannot be sealed, and links are."""
    if allreduce == "library" and star.sealed:
        raise InputError(
            "--allreduce library is MPI's own sum, which cannot be sealed, and links to other hosts are; give another "
            "--allreduce, or --seal off"
        )


def settle_allreduce(star: Star, allreduce: str, wire: str, largest: int) -> tuple[str, str | None]:
    """Rank 0: the rule by which sums are made in a run whose largest has so many numbers (0: not known), and a line that
    says what was chosen, where that was left to us.

    The links' latency is measured in any case, so that waiting suits it on every rank. Raises StarError.
    """
    if star.rank.size == 1:
        return "star" if allreduce == AUTO else allreduce, None
    check_sealed(star, allreduce)
    links = measure_links(star, wire=wire, largest=max(1, largest) if allreduce == AUTO else 0)
    if allreduce != AUTO:
        return allreduce, None
    rule = choose(links.times, star.rank.size)
    return rule, describe(rule, links, star.rank.size)
