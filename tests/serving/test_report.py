"""What a run's table and its JSON say of the time a token takes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tpimpi.engine.figures import ExpertFigures, RankFigures
from tpimpi.serving.generate import GenerationFigures
from tpimpi.serving.report import Answer, Report
from tpimpi.serving.session import END_REASONS


def answer(*gaps: float, ended: str = "end") -> Answer:
    times = [(1, 1.5)]
    for number, gap in enumerate(gaps, start=2):
        times.append((number, times[-1][1] + gap))
    made = GenerationFigures(rows=5, passes=len(times), sampled=len(times))
    return Answer.timed("text", [7] * len(times), 3, ready=1.0, times=times, cached_tokens=0, figures=made, ended=ended)


def figures(streamed_bytes_per_token: int = 0, read_wait_s: float = 0.0) -> RankFigures:
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(RankFigures)), 0)
    values |= {"host": "vm", "memory_bytes": None, "disk_bytes_per_s": 1e9, "timeline": [], "experts": None}
    values |= {"streamed_bytes_per_token": streamed_bytes_per_token, "read_wait_s": read_wait_s}
    return RankFigures(**values)


def test_a_few_slow_tokens_show_in_the_mean_and_not_in_the_median() -> None:
    """As under a processor quota: two thirds of the tokens wait for nothing, the others for a whole period."""
    found = answer(0.02, 0.02, 0.11, 0.02, 0.11, 0.02)
    assert found.ttft_s == pytest.approx(0.5)
    assert found.s_per_token == pytest.approx(0.02) and found.s_per_token_mean == pytest.approx(0.05)


def test_one_token_has_no_time_between_two() -> None:
    assert (answer().s_per_token, answer().s_per_token_mean) == (None, None)
    empty = Answer.timed("", [], 3, ready=1.0, times=[], cached_tokens=0, figures=GenerationFigures(), ended="end")
    assert (empty.ttft_s, empty.s_per_token, empty.s_per_token_mean, empty.tokens_per_pass) == (None, None, None, None)


def test_tokens_of_one_pass_share_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A pass of 0.6 s that gave three tokens, one of 0.5 s that gave one: as if each had come after 0.2, and after 0.5."""
    times = [(1, 1.5), (2, 2.1), (2, 2.1), (2, 2.1001), (3, 2.6001)]
    made = GenerationFigures(rows=20, passes=3, sampled=5, drafted=7, accepted=2)
    found = Answer.timed("text", [7] * 5, 3, ready=1.0, times=times, cached_tokens=1, figures=made, ended="max_tokens")
    assert found.s_per_token == pytest.approx(0.2, abs=1e-3) and found.s_per_token_mean == pytest.approx(
        1.1 / 4, abs=1e-3
    )
    counted = (found.cached_tokens, found.rows_computed, found.passes, found.drafted_tokens, found.accepted_tokens)
    assert counted == (1, 20, 3, 7, 2) and found.tokens_per_pass == pytest.approx(5 / 3)
    report = Report("model", "q8_0", "native", "star")
    report.add(found)
    report.ranks = [figures()]
    report.print_table()
    assert "3 passes, 1.67 tokens each (2 of 7 drafted tokens accepted)" in capsys.readouterr().err
    assert (report.passes, report.accepted_tokens) == (3, 2)


def test_table_and_json_name_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("model", "q8_0", "native", "star:65536,mesh")
    report.add(answer(0.02, 0.02, 0.11))
    report.ranks = [figures()]
    report.print_table()
    last = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("model "))
    assert last.endswith("0.05 s/token (mean; median 0.02)")
    assert "star up to 256 KiB, mesh above" in last  # as the run said when it chose it
    report.write(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["allreduce"] == "star:65536,mesh"
    for where in (found, found["answers"][0]):
        assert where["finish_reason"] == "stop"
        assert where["s_per_token"] == pytest.approx(0.02) and where["s_per_token_mean"] == pytest.approx(0.05)


def test_experts_are_told_of_in_a_line_for_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("model", "q8_0", "native", "star", 512)
    report.add(answer(0.02))
    did = ExpertFigures(
        used=200, hits=150, expected=40, expected_used=30, bytes_read=90_000_000, expected_bytes=40_000_000
    )
    report.ranks = [figures(), replace(figures(), rank=1, experts=did)]
    report.print_table()
    said = capsys.readouterr().err
    assert "experts of r0" not in said
    assert (
        "experts of r1: 200 used, 75% of them in memory; 40 read before they were chosen, 75% of them used "
        "(40 MB of 90 MB read)" in said
    )


def test_why_an_answer_ended_is_in_the_words_of_openai() -> None:
    reasons = {ended: answer(ended=ended).finish_reason for ended in END_REASONS}
    openai = {"end": "stop", "stop": "stop", "max_tokens": "length", "context": "length"}
    assert reasons == {**openai, "cancelled": "abort"}  # for which OpenAI has no word: vLLM's


def test_the_line_below_the_table_says_that_it_is_of_the_last_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("model", "q8_0", "native", "star")
    report.ranks = [figures()]
    report.add(answer(0.02))
    report.print_table()
    assert "last of" not in capsys.readouterr().err
    report.add(answer(0.02, 0.02))
    report.print_table()
    assert " · last of 2 prompts: 3 prompt tokens, 3 generated · " in capsys.readouterr().err


def test_the_rate_of_a_disk_comes_from_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("model", "q8_0", "native", "star")
    report.add(answer(0.02, 0.02, 0.11))
    report.ranks = [figures(streamed_bytes_per_token=50_000_000, read_wait_s=1.0)]
    report.print_table()
    assert "50 MB a token from the disk of vm at 1000 MB/s, 0.05 s/token" in capsys.readouterr().err
