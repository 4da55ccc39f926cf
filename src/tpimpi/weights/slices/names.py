"""The names of slice files."""

from __future__ import annotations

import re


def slice_name(rank: int, ranks: int) -> str:
    """File name of one rank's slice."""
    return f"rank-{rank}-of-{ranks}.h5"


def parse_slice_name(name: str) -> tuple[int, int] | None:
    """Undo `slice_name`: (rank, ranks), or None for a name that no slice has, such as rank-2-of-2.h5."""
    match = re.fullmatch(r"rank-([0-9]{1,9})-of-([0-9]{1,9})\.h5", name)
    parsed = (int(match[1]), int(match[2])) if match else None
    return parsed if parsed and parsed[0] < parsed[1] and slice_name(*parsed) == name else None
