"""How much memory a rank may take, and what that buys.

Everything that a rank takes is one of these (`Needs`, and `Budget` for what is chosen):

    base         what it has resident when its model is about to be loaded: Python, libraries, MPI, the tokenizer
    cache        keys and values, for the context
    work         activations and messages of the largest step; spans of a trace; of an audit a tile; on rank 0 what sequences
                 take beside their keys and values
    reserve      RESERVE_BYTES: what cannot be seen from inside (page cache of the files it reads, the kernel's own tables)
    buffers      the window's ring
    pinned       tiles that stay; all that is left
    experts      of a mixture: its expert cache, with all that is left when the tiles that every token uses are pinned

`--memory SIZE` bounds their sum. `--memory auto` finds the sum: what the host has free, or the smallest memory limit of a
cgroup that the rank is in (batch jobs are such), less a reserve for others, is divided among the ranks there (`divide`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpimpi.errors import InputError
from tpimpi.system.memory import JOB, Place
from tpimpi.system.units import show_megabytes_rounded_up, show_size

# Page cache, page tables and sockets took 12 to 17 MB.
RESERVE_BYTES = 24_000_000
# From one start to the next a rank took up to 3 MB more, on a busy machine.
_START_VARIATION_BYTES = 4_000_000


@dataclass(frozen=True)
class Needs:
    """What one rank needs, in bytes; see the module's docstring. `tiles` are all that every token uses, together; `experts`
    all experts, of which the cache has room for `min_experts` at least; `position_work` is what one position more in a
    step would add to `work`; `draft` is how many tokens of a draft a step may have beside the last one."""

    base: int
    cache: int
    work: int
    min_buffers: int
    usual_buffers: int
    tiles: int
    min_experts: int = 0
    experts: int = 0
    position_work: int = 0
    draft: int = 0

    @property
    def fixed(self) -> int:
        """What does not depend on the budget."""
        return self.base + self.cache + self.work + RESERVE_BYTES

    @property
    def least(self) -> int:
        """The smallest budget that works."""
        return self.fixed + self.min_buffers + self.min_experts

    @property
    def most(self) -> int:
        """The budget beyond which more memory is of no use."""
        return self.fixed + self.tiles + self.experts


@dataclass(frozen=True)
class Budget:
    """What a rank does with its memory, in bytes."""

    buffers: int
    pinned: int  # at most
    experts: int = 0


def make_budget(needs: Needs, promise: int, whose: str = "") -> Budget:
    """What `promise` bytes buy; `whose` says for a message where they come from. Everything is pinned where that fits,
    and the ring then takes nothing.

    Otherwise the ring is a quarter of what is left, within its least and usual sizes. Raises InputError where it cannot
    work.
    """
    if promise < needs.least:
        whose = whose or f"--memory is {show_size(promise)}"
        raise InputError(
            f"{whose}, this rank needs at least {show_megabytes_rounded_up(needs.least + _START_VARIATION_BYTES)} "
            f"({show_size(needs.base)} for program and libraries, {show_size(needs.cache)} for keys and values, "
            f"{show_size(needs.work + RESERVE_BYTES)} to work with, "
            f"{show_size(needs.min_buffers + needs.min_experts)} for buffers); "
            "give that, or a smaller --context"
        )
    left = promise - needs.fixed - needs.min_experts
    if needs.tiles <= left:
        # Experts get all that is left. That costs nothing elsewhere: keys and values have their room for the whole context
        # in `fixed`, and reads go past the page cache, so it has no use for more than the reserve.
        experts = min(needs.experts, needs.min_experts + left - needs.tiles)
        return Budget(needs.usual_buffers, needs.tiles, experts)
    buffers = min(max(left // 4, needs.min_buffers), needs.usual_buffers)
    return Budget(buffers, left - buffers, needs.min_experts)


def caches_beside_tiles(needs: Needs, promise: int | None, most: int) -> int:
    """For how many sequences, 1 to `most`, `promise` bytes have room for keys and values beside all tiles; None: no bound.

    So many have them of a draft model too: it is to take nothing from tiles beyond what it needs for one."""
    if promise is None:
        return most
    return 1 + min(most - 1, max(0, promise - needs.most) // max(1, needs.cache))


def divide(free: int, needs: Mapping[int, Needs]) -> dict[int, int]:
    """Divide `free` bytes among ranks (by number): so that each reads as much for a token, as far as that can be.

    A token waits for the rank that reads most. So the rank with most to keep, rank 0 with its head and tokenizer, gets more.
    What is beyond everyone's needs is divided evenly. A rank may get less than its least where there is not enough for all.
    """
    whole = sum(need.least for need in needs.values())
    if whole > free:  # not enough in any case: in proportion
        return {rank: free * need.least // whole for rank, need in needs.items()}
    beyond = {rank: max(0, need.most - need.least) for rank, need in needs.items()}
    level = _level(list(beyond.values()), free - whole)
    shares = {rank: need.least + max(0, beyond[rank] - level) for rank, need in needs.items()}
    rest = (free - sum(shares.values())) // max(1, len(needs))
    return {rank: share + max(0, rest) for rank, share in shares.items()}


def _level(sizes: Sequence[int], spare: int) -> int:
    """The least level s for which the parts of `sizes` above it, max(0, size - s), fit into `spare` together."""
    if sum(sizes) <= spare:
        return 0
    ordered = sorted(sizes, reverse=True)
    above = 0
    for count, size in enumerate(ordered, start=1):
        above += size
        lower = ordered[count] if count < len(ordered) else 0
        if above - count * lower >= spare:
            return -(-(above - spare) // count)
    return 0


def allowances(
    places_of: Mapping[int, Sequence[Place]], hosts: Mapping[int, str], needs: Mapping[int, Needs]
) -> dict[int, int]:
    """What each rank may take under --memory auto: of every place it is in, its part of what is free beyond the reserve.

    `places_of`, `hosts` and `needs` are by rank. What ranks have resident already is theirs to keep (`needs.base`).
    """
    shared: dict[tuple[str, str], list[int]] = {}
    for rank, mine in places_of.items():
        for place in mine:
            shared.setdefault((hosts[rank], place.name), []).append(rank)
    found = dict.fromkeys(places_of, 1 << 60)
    for (_, name), ranks in shared.items():
        at = [place for rank in ranks for place in places_of[rank] if place.name == name]
        free = min(place.free for place in at) - at[0].reserve
        free += 0 if name == JOB else sum(needs[rank].base for rank in ranks)
        for rank, part in divide(max(0, free), {rank: needs[rank] for rank in ranks}).items():
            found[rank] = min(found[rank], part)
    return found


def per_rank(sizes: Sequence[int], ranks: int) -> list[int]:
    """The meaning of --memory for so many ranks: one size for each, or one for all. Raises InputError."""
    if len(sizes) == 1:
        return list(sizes) * ranks
    if len(sizes) != ranks:
        raise InputError(
            f"--memory has {len(sizes)} sizes, this run has {ranks} ranks; give one for each, or one for all"
        )
    return list(sizes)
