"""Sizes as users write and read them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from tpimpi.errors import InputError, shorten

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmgt]?)(i?)b?)", re.IGNORECASE | re.ASCII)


MIN_SIZE_BYTES = 1_000_000  # bytes; a smaller one is a unit that was forgotten


def parse_size(text: str, option: str, least: int = MIN_SIZE_BYTES) -> int:
    """Bytes that a user writes: 700M and 2.5G are powers of ten, 512MiB and 2GiB (or Mi, Gi) of two, 700000000 bytes.

    Raises InputError, which names `option`, also for less than `least`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{option} is {shorten(text)!r}, must be a size such as 700M, 2.5G, 512MiB or 2GiB")
    size = math.floor(Fraction(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].lower()])
    if not least <= size < 1 << 60:
        raise InputError(
            f"{option} is {shorten(text)!r}, which is {size} bytes; give a size such as 700M, 2.5G or 512MiB"
        )
    return size


def show_size(nbytes: float) -> str:
    """Bytes for people, in powers of ten: "412 MB", "3.90 GB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def show_megabytes_rounded_up(nbytes: int) -> str:
    """A size that is at least `nbytes`, as --memory takes it: "412 MB"."""
    return f"{-(-nbytes // 1_000_000)} MB"


def show_time(seconds: float) -> str:
    """A short time for people: "0.25 ms", "80 us"."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.0f} us"


def show_minutes(seconds: float) -> str:
    """A long time for people: "45 s", "2:45 min"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02} min"


def show_rate(bytes_per_s: float) -> str:
    """A rate for people: "11.8 MB/s", "950 MB/s"."""
    return f"{bytes_per_s / 1e6:.1f} MB/s" if bytes_per_s < 1e8 else f"{bytes_per_s / 1e6:.0f} MB/s"
