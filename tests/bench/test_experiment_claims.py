"""The claims on the page of bench/experiments."""

from __future__ import annotations

from typing import Any

import pytest

from bench.experiments import claims as claims_of
from bench.experiments import rows as rows_of
from bench.experiments import tables
from tests.support.experiment_pages_cases import found_of
from tests.support.experiments import result


def device_results(**seconds: tuple[float, float]) -> list[Any]:
    """7B in q4_0 where memory is short, on one device and on four: (first token, token)."""
    rows = rows_of.choose(rows_of.read_rows(), ["devices"], "shape=llama-2-7b format=q4_0 devices=1,4")
    made = []
    for row, (first, token) in zip(rows, seconds.values(), strict=True):
        made.append(tables.Found(result(row, ttft_s=first, ttft_cold_s=first, s_per_token=token)))
    return made


@pytest.mark.parametrize(
    ("one", "four", "verdict"),
    [
        ((20.0, 12.0), (2.0, 1.0), "confirmed"),
        ((20.0, 11.9), (2.0, 1.0), "not so"),
        ((19.0, 30.0), (2.0, 1.0), "not so"),
    ],
)
def test_a_claim_is_judged_by_its_figures(one: tuple[float, float], four: tuple[float, float], verdict: str) -> None:
    judged = {text: (said, figures) for text, said, figures in claims_of.claims(device_results(one=one, four=four))}
    said, figures = next(found for text, found in judged.items() if text.startswith("Ours"))
    assert said == verdict
    assert f"({one[1] / four[1]:.3g}" in figures


@pytest.mark.parametrize(
    ("less", "verdict"), [(0.92, "better"), (0.9, "confirmed"), (0.78, "confirmed"), (0.77, "worse"), (-0.1, "not so")]
)
def test_a_share_is_judged_by_what_is_left_of_it(less: float, verdict: str) -> None:
    assert claims_of._verdict_less(less, 0.8, 0.9) == verdict


def test_what_was_not_measured_is_said_to_be_so() -> None:
    assert {verdict for _, verdict, _ in claims_of.claims([])} == {"not measured"}


def claimed(start: str, found: list[Any]) -> tuple[str, str]:
    return next((verdict, said) for text, verdict, said in claims_of.claims(found) if text.startswith(start))


def star_runs(**seconds: tuple[float, float]) -> list[Any]:
    """Whole runs with the star on five networks: (token, first token) of each."""
    networks = {
        "near": ("0.3ms", "300Mbit/s"),
        "middle": ("2ms", "300Mbit/s"),
        "narrow": ("2ms", "50Mbit/s"),
        "far": ("10ms", "300Mbit/s"),
        "wide": ("2ms", "1Gbit/s"),
    }
    found = []
    for name, (latency, bandwidth) in networks.items():
        only = f"measure=generate allreduce=star latency={latency} bandwidth={bandwidth}"
        (row,) = rows_of.choose(rows_of.read_rows(), ["network"], only)
        token, first = seconds[name]
        found.append(found_of(row, s_per_token=token, ttft_s=first))
    return found


@pytest.mark.parametrize(
    ("middle", "narrow", "verdict"),
    [
        # Latency: middle against near (1 s); bandwidth: narrow against middle
        ((3.0, 3.0), (6.0, 6.0), "confirmed"),  # 3 and 2 times
        ((2.0, 2.0), (3.6, 3.6), "as much as bandwidth"),  # 2 and 1.8 times
        ((2.0, 2.0), (4.4, 4.4), "as much as bandwidth"),  # 2 and 2.2 times
        ((2.0, 2.0), (6.0, 6.0), "not so"),  # 2 and 3 times
        ((2.4, 1.0), (4.8, 6.0), "confirmed for tokens, not so for a prompt"),  # 2.4 and 2, 1 and 6 times
    ],
)
def test_latency_is_judged_beside_as_little_of_the_bandwidth(
    middle: tuple[float, float], narrow: tuple[float, float], verdict: str
) -> None:
    found = star_runs(near=(1.0, 1.0), middle=middle, narrow=narrow, far=(9.0, 1.5), wide=(0.5, 0.5))
    said, figures = claimed("Link latency", found)
    assert said == verdict
    assert "33 times the latency (0.3 to 10 ms) 9.00 and 1.50 times" in figures
    assert claimed("Link latency", found[:4])[0] == "not measured"


def window_rows(computing: float, rows: dict[str, tuple[float, float]]) -> list[Any]:
    """7B in q4_0 with all of it pinned, and with less memory: (streamed GB at 500 MB/s, seconds a token)."""
    found = []
    for memory, (streamed, token) in {"5G": (0.0, computing), **rows}.items():
        only = f"measure=generate format=q4_0 memory={memory}"
        (row,) = rows_of.choose(rows_of.read_rows(), ["memory"], only)
        found.append(found_of(row, s_per_token=token, streamed_bytes_per_token=[streamed * 1e9]))
    return found


@pytest.mark.parametrize(
    ("rows", "verdict", "case"),
    [
        (
            {"4G": (0.1, 1.0), "3G": (0.4, 1.05)},
            "confirmed",
            "the smaller is hidden. Here that is reading, which takes up to ",
        ),
        (
            {"2G": (1.0, 2.0), "1G": (2.0, 4.1)},
            "confirmed, but what reading takes beyond computing still shows",
            "the smaller is hidden. Here that is computing (1000 ms); reading takes 2.00 to 4.00 times as long, and ",
        ),
        (
            {"4G": (0.25, 1.0), "1G": (2.0, 4.0)},
            "confirmed, but what reading takes beyond computing still shows",
            "Here that is reading or computing (1000 ms): reading takes 0.50 to 4.00 times as long, and what it takes",
        ),
        ({"4G": (0.25, 1.5)}, "worse", "(worst: memory 4G): the smaller is not wholly hidden. Here that is reading, "),
    ],
)
def test_what_the_window_hides_is_said_as_it_is(rows: dict[str, tuple[float, float]], verdict: str, case: str) -> None:
    said, figures = claimed("The window", window_rows(1.0, rows))
    assert said == verdict
    assert case in figures
    assert ("nothing hides" in figures) == ("beyond" in verdict)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (95.0, "about the same as it"),
        (114.0, "about the same as it"),
        (80.0, "20 % less than it"),
        (140.0, "40 % more than it"),
    ],
)
def test_offloading_is_told_with_its_cold_first_token(one: float, said: str) -> None:
    home = "peers", "memory=1GiB shape=llama-2-7b format=bf16 "
    found = []
    for only, figures in (
        ("measure=peer program=accelerate", {"s_per_token": 100.0, "ttft_s": 101.0}),
        ("measure=generate devices=1", {"s_per_token": one, "ttft_cold_s": 99.0}),
        ("measure=generate devices=4", {"s_per_token": 15.0, "ttft_cold_s": 18.0}),
    ):
        (row,) = rows_of.choose(rows_of.read_rows(), [home[0]], home[1] + only)
        found.append(found_of(row, **figures))
    verdict, figures_said = claimed("80 to 90 %", found)
    assert verdict == "confirmed"
    assert figures_said == (
        "7B in bf16, four devices, 15 s a token, cold first token 18.0 s: a token takes 85 % less than accelerate (100 s a "
        f"token, cold first token 101 s), one device {said}"
    )
