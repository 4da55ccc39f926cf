"""What each rank measured of itself during a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpimpi.system.units import show_size


@dataclass(frozen=True)
class ExpertFigures:
    """What an expert cache did: numbers of uses, and bytes."""

    used: int = 0  # experts that blocks wanted
    hits: int = 0  # of those, there already or on their way, for whatever reason
    expected: int = 0  # read because they were expected
    expected_used: int = 0  # of those, wanted then
    bytes_read: int = 0
    expected_bytes: int = 0  # of those bytes, for what was expected
    wait_s: float = 0.0


@dataclass(frozen=True)
class RankFigures:
    """One rank's part of the report. Times in seconds, over the whole run.

    `memory_bytes` is what --memory promised or found, None under --window. `pinned_bytes` and `buffer_bytes` are the
    tiles that were kept at the end, and the ring; `streamed_bytes_per_token` is what was not kept, `device` the disk it
    is on (st_dev), `disk_bytes_per_s` what the disk gave at the start (0 where it was not measured). `timeline` has
    [seconds, resident, pinned, buffers], in bytes. Of the peak memory, `weights_bytes` are tiles: what the window, the
    expert cache and a draft model took at most; `cache_bytes` keys and values, `tokenizer_bytes` what the tokenizer took
    (rank 0), and `base_bytes` all the rest: Python, libraries, activations. `heads`, `kv_heads` and `columns` are this
    rank's; `star_s` has the waiting for other ranks in it.
    """

    rank: int
    host: str
    heads: int
    kv_heads: int
    columns: int
    memory_bytes: int | None
    peak_rss_bytes: int
    weights_bytes: int
    cache_bytes: int
    tokenizer_bytes: int
    base_bytes: int
    pinned_bytes: int
    buffer_bytes: int
    streamed_bytes_per_token: int
    device: int
    disk_bytes_per_s: float
    bytes_read: int
    read_wait_s: float
    compute_s: float
    star_s: float
    experts: ExpertFigures | None  # of a mixture
    timeline: list[list[int | float]]


@dataclass(frozen=True)
class AuditFigures:
    """What was audited: `steps` were made, of `audits` of them one sum was audited, `tiles` tiles were computed by rank 0.
    `rate` is --audit's part of the steps, None for auto. `against` says what answers were compared with. `seconds` went into
    audits, `step_seconds` into steps."""

    rate: float | None
    steps: int
    audits: int
    tiles: int
    seconds: float
    step_seconds: float
    against: str


@dataclass(frozen=True)
class LiveFigures:
    """What a rank says of itself while the run goes on: memory now, and totals since its start."""

    resident_bytes: int
    bytes_read: int
    read_wait_s: float
    compute_s: float
    star_s: float


def disk_lines(streams: Sequence[tuple[str, int, int, float]], *, alone: bool) -> Iterator[str]:
    """What each disk gives to the ranks that stream from it, in a line; if `alone`, also what it would be with one for each.

    `streams` has for each rank: host, device, bytes for a token, and bytes a second.
    """
    disks: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for host, device, nbytes, rate in streams:
        if nbytes and rate:
            disks.setdefault((host, device), []).append((nbytes, rate))
    for (host, _), here in disks.items():
        whole, rate = sum(nbytes for nbytes, _ in here), sum(rate for _, rate in here)
        line = f"{show_size(whole)} a token from the disk of {host} at {show_size(rate)}/s, {whole / rate:.2g} s/token"
        if len(here) > 1 and alone:
            own = max(nbytes for nbytes, _ in here) / rate
            line += f"; {len(here)} ranks share it: with such a disk for each {own:.2g} s"
        yield line
