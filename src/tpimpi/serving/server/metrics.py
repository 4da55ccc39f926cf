"""Figures for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tpimpi.serving.server.wire import Figures

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RANK = ("rank", "host")


class Metrics:
    """What the front counts by itself, and what rank 0 says."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        each: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("tpimpi_requests", "Requests that were done", ("path", "status"), **each)
        self.cancelled = Counter("tpimpi_requests_cancelled", "Requests whose client went away", **each)
        seconds: dict[str, Any] = {"buckets": SECONDS, **each}
        self.first_token = Histogram("tpimpi_first_token_seconds", "From a request to its first token", **seconds)
        self.duration = Histogram("tpimpi_request_seconds", "From a request to its end", **seconds)
        self._tokens = Counter("tpimpi_tokens", "Tokens of answers", **each)
        self._prompt_tokens = Counter("tpimpi_prompt_tokens", "Tokens of prompts that were computed", **each)
        self._cached_tokens = Counter("tpimpi_prompt_tokens_cached", "Tokens of prompts that were there", **each)
        self._drafted = Counter("tpimpi_tokens_drafted", "Drafted tokens that were checked", **each)
        self._accepted = Counter("tpimpi_tokens_accepted", "Drafted tokens that were right", **each)
        self._audits = Counter("tpimpi_audits", "Sums of the ranks that were audited, and had no fault", **each)
        self._running = Gauge("tpimpi_running", "Answers that are being made", **each)
        self._waiting = Gauge("tpimpi_waiting", "Requests that wait", **each)
        self._pages_used = Gauge("tpimpi_pages_used", "Pages of keys and values that are used", **each)
        self._pages = Gauge("tpimpi_pages", "Pages of keys and values that there may be", **each)
        self._memory = Gauge("tpimpi_rank_memory_bytes", "Memory of a rank", RANK, **each)
        self._disk = Gauge("tpimpi_rank_disk_read_bytes_total", "Read from a rank's disk", RANK, **each)
        names = ("disk", "star", "compute")
        self._share = Gauge("tpimpi_rank_share", "Of the last interval, what a rank did", (*RANK, "what"), **each)
        self._names = names

    def take(self, figures: Figures) -> None:
        """What rank 0 says, about once a second."""
        self._tokens.inc(figures.tokens)
        self._prompt_tokens.inc(figures.prompt_tokens)
        self._cached_tokens.inc(figures.cached_tokens)
        self._drafted.inc(figures.drafted_tokens)
        self._accepted.inc(figures.accepted_tokens)
        self._audits.inc(figures.audits)
        self._running.set(figures.running)
        self._waiting.set(figures.waiting)
        self._pages_used.set(figures.pages_used)
        self._pages.set(figures.pages)
        for rank in figures.ranks:
            labels = (str(rank.rank), rank.host)
            self._memory.labels(*labels).set(rank.memory_bytes)
            self._disk.labels(*labels).set(rank.disk_bytes)
            for what, seconds in zip(self._names, (rank.disk_s, rank.star_s, rank.compute_s), strict=True):
                self._share.labels(*labels, what).set(share(seconds, figures.interval_s))

    def text(self) -> bytes:
        """In the form that Prometheus reads."""
        return generate_latest(self._registry)


def share(seconds: float, interval: float) -> float:
    """The part of an interval, 0 to 1."""
    return min(1.0, max(0.0, seconds / interval)) if interval > 0 else 0.0
