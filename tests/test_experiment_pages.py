"""The page of bench/experiments.py: its tables, pictures and claims, of results that are made up."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from test_experiments import result, rows_of, run

sys.path.insert(0, str(ROOT / "bench"))
try:
    pages = importlib.import_module("experiment_pages")
    claims_of = importlib.import_module("experiment_claims")
    tables = importlib.import_module("experiment_tables")
finally:
    sys.path.remove(str(ROOT / "bench"))

# The page


def test_a_page_is_filled_in_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table formats -->\nold\n<!-- end -->\n\nAfter.\n")
    row = next(row for row in rows_of.read_rows("full") if row.measure == "perplexity")
    path = tmp_path / "results.jsonl"
    figures = {
        "tokens_scored": 7,
        "perplexity": 12.5,
        "perplexity_se": 0.25,
        "against": {"perplexity": 12.0, "kl_mean": 0.01},
    }
    path.write_text(json.dumps(result(row, **figures)) + "\n")
    for _ in range(2):  # what is filled in is filled in again
        assert run("page", "--page", page, "--results", path).returncode == 0
        text = page.read_text()
        assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
        assert "| bf16 | 7 | 12.500 ± 0.25 | 12.000 | 0.01 |" in text


def test_a_page_keeps_its_line_ends(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_bytes(b"Before.\r\n<!-- table formats -->\r\n<!-- end -->\r\n")
    results.touch()
    for _ in range(2):
        assert run("page", "--page", page, "--results", results).returncode == 0
        lines = page.read_bytes().split(b"\n")
        assert lines[2:4] == [b"\r", b"Not measured yet.\r"] and all(line.endswith(b"\r") for line in lines[:-1])


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = run("page", "--page", page, "--results", tmp_path / "resutls.jsonl")
    assert (done.returncode, done.stderr.count("\n"), page.exists()) == (2, 1, False)
    assert done.stderr.startswith(f"experiments: --results {tmp_path}/resutls.jsonl: there is no such file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "<!-- table devices -->\nmine\n<!-- table memory -->\n<!-- end -->\n",
            "line 1: table devices has no <!-- end -->",
        ),
        ("mine\n<!-- table devices -->\n", "line 2: table devices has no <!-- end -->"),
        ("<!-- table nonsense -->\n<!-- end -->\n", "line 1: there is no table nonsense; there are "),
    ],
)
def test_a_page_with_wrong_marks_is_refused_and_left_alone(tmp_path: Path, text: str, said: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    (tmp_path / "results.jsonl").touch()
    done = run("page", "--page", page, "--results", tmp_path / "results.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"experiments: {page}, {said}")
    assert page.read_text() == text


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
