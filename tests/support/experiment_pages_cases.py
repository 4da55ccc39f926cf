"""What tests of experiment pages share."""

from __future__ import annotations

from typing import Any

from bench.experiments import tables
from tests.support.experiments import result


def figures_of(row: Any) -> dict[str, Any]:
    """Figures such as a row of this kind has, all of them made up."""
    ranks = [1e8] * row.devices
    token = {"s_per_token": 2.0, "ttft_s": 3.0}
    sums = dict.fromkeys(("star", "exchange", "mesh", "ring", "tree", "library"), 0.02)
    streamed: dict[str, Any] = {"memory_bytes": ranks, "streamed_bytes_per_token": ranks}
    predicted = {**token, **streamed, "limit": "disk", "shares": "1", "experts_held": [0.5], "hits": [0.75]}
    kinds: dict[str, dict[str, Any]] = {
        "generate": {
            **token,
            **streamed,
            "load_s": 1.0,
            "ttft_cold_s": 4.0,
            "pinned_bytes": ranks,
            "peak_rss_bytes": ranks,
            "parts": {"compute": 0.5, "read_wait": 0.25, "star": 0.25},
        },
        "peer": {**token, "load_s": 1.0, "ttft_warm_s": 3.0, "versions": {"python": "3.11.7", "torch": "2.13.0"}},
        "allreduce": {
            "rows": [{"numbers": n, "seconds": sums, "two_hops": 0.01, "auto": "star"} for n in (4096, 524288)]
        },
        "perplexity": {
            "tokens_scored": 7,
            "perplexity": 12.5,
            "perplexity_se": 0.25,
            "against": {"perplexity": 12.0, "kl_mean": 0.01},
        },
        "predict": {
            "assumed": {"why": "it is said"},
            "ranks": {"1": predicted},
            "uniform": {"1": predicted},
        },
        "emulation": {
            "latency_wished_s": 0.001,
            "latency_s": 0.0011,
            "cores_wished": 0.5,
            "cores": 0.499,
            "read_wished_bps": 2e8,
            "read_bps": 2.1e8,
            "bandwidth_wished": 37_500_000,
            "bandwidth": 35_875_000,
        },
        "ways": {"s_per_token": {"shared memory": 0.04, "loopback": 0.05, "home": 0.06}},
    }
    return kinds[row.measure]


def found_of(row: Any, **figures: Any) -> Any:
    return tables.Found(result(row, **{**figures_of(row), **figures}))
