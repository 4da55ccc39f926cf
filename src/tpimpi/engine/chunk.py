"""How many positions of a mixture's prompt are computed at once, where nobody says."""

from __future__ import annotations

from collections.abc import Sequence

from tpimpi.engine.budget import Needs
from tpimpi.engine.overlap import DENSE_CHUNK, MAX_CHUNK, MIXTURE_CHUNK

# Of the memory for experts, at most so large a part (1 / so many) goes to the activations of a longer chunk: tokens after
# the prompt want experts there.
ACTIVATIONS_PART = 8


def mixture_chunk(needs: Sequence[Needs], promises: Sequence[int], context: int) -> int:
    """Positions of a chunk, for all ranks: `needs` are each rank's with MIXTURE_CHUNK, `promises` the bytes it may take.

    A chunk reads nearly all experts that are not in memory, however few positions it has; half as many chunks read half as
    much. So the fewer experts fit, on the rank where fewest do, the longer it is: MIXTURE_CHUNK / the part that fits, as
    far as its activations fit within every rank's promise.
    """
    fits, longest = 1.0, min(MAX_CHUNK, context)
    for need, promise in zip(needs, promises, strict=True):
        room = promise - need.fixed - need.tiles  # for experts
        if need.experts:
            fits = min(fits, max(room, need.min_experts) / need.experts)
        spare = max(0, (room - need.min_experts) // ACTIVATIONS_PART, room - need.experts)
        if need.position_work:
            longest = min(longest, min(MIXTURE_CHUNK, context) + spare // need.position_work)
    wanted = min(longest, round(MIXTURE_CHUNK / fits))
    return max(MIXTURE_CHUNK, wanted // DENSE_CHUNK * DENSE_CHUNK)
