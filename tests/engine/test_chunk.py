"""Positions of a mixture's prompt that are computed at once, by what memory allows."""

from __future__ import annotations

import pytest

from tpimpi.engine.budget import RESERVE_BYTES, Needs
from tpimpi.engine.chunk import mixture_chunk

MB = 10**6
EXPERTS, LEAST = 800 * MB, 20 * MB
ELSE = 350 * MB + RESERVE_BYTES  # all but experts


def needs(position_work: int, experts: int = EXPERTS, least: int = LEAST) -> Needs:
    """100 MB to begin with, 50 MB to work with, 200 MB that every token uses, and these experts."""
    return Needs(100 * MB, 0, 50 * MB, 10 * MB, 20 * MB, 200 * MB, least, experts, position_work)


@pytest.mark.parametrize(
    ("room", "position_work", "context", "chunk"),
    [
        (800, 10_000, 8192, 512),  # all experts fit
        (400, 10_000, 8192, 1024),  # half of them: twice as long
        (200, 10_000, 8192, 2048),
        (25, 100, 8192, 4096),  # never longer than that
        (200, 10_000, 1500, 1408),  # nor than the context, in whole 128
        (200, 40_000, 8192, 1024),  # (200 - 20) MB / 8 are room for 562 positions more than 512
        (20, 10_000, 8192, 512),  # no memory for longer ones
        (200, 10_000, 100, 512),
    ],
)
def test_the_fewer_experts_fit_the_longer_are_chunks(room: int, position_work: int, context: int, chunk: int) -> None:
    assert mixture_chunk([needs(position_work)], [ELSE + room * MB], context) == chunk


def test_the_rank_with_the_fewest_experts_decides_and_all_have_room() -> None:
    roomy, tight = ELSE + 800 * MB, ELSE + 200 * MB
    assert mixture_chunk([needs(10_000), needs(10_000)], [roomy + 100 * MB, tight], 8192) == 2048
    # One that has just all its experts gives (80 - 20) MB / 8 of them: room for 750 positions more.
    bare = needs(10_000, experts=80 * MB, least=20 * MB)
    assert mixture_chunk([bare, needs(10_000)], [ELSE + 80 * MB, tight], 8192) == 512 + 750 // 128 * 128
    # One without experts, and 7 MB more than it needs: for 700.
    none = needs(10_000, experts=0, least=0)
    assert mixture_chunk([none, needs(10_000)], [ELSE + 7 * MB, tight], 8192) == 512 + 700 // 128 * 128
    assert mixture_chunk([none, needs(10_000)], [ELSE, tight], 8192) == 512
