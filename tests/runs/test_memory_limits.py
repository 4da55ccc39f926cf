"""Runs with a given memory: refused below the least, and the same text with any more."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults_cases import (
    RANKS,
    SOME,
    Runs,
    on_one_and_two_ranks,
    on_one_rank,
)
from tests.support.launch import Result, run_command
from tests.support.ranks import Ranks
from tpimpi.system.units import parse_size

MB = 1_000_000


on_two_ranks = pytest.mark.parametrize("runs", RANKS[1:], indirect=True)


@on_one_and_two_ranks
@pytest.mark.slow_but("1")
def test_less_memory_than_works_is_refused(runs: Runs) -> None:
    for size in ("1M", f"{runs.least - 10}M"):
        result = runs.run("--memory", size)
        assert (result.code, result.out) == (2, ""), result.err
        assert len(result.our_lines) == 1, result.err
        who = "tpimpi" if runs.ranks == 1 else r"r0 \S+"
        mb = size.removesuffix("M")
        line = rf"{who}: --memory is {mb} MB, this rank needs at least (\d+) MB \(.*"
        match = re.fullmatch(line, result.our_lines[0])
        assert match, result.our_lines[0]
        assert abs(int(match[1]) - runs.least) <= 4  # the program itself is not always as large


def _check_kept(runs: Runs, memory: str, report: Path) -> list[dict[str, Any]]:
    """A run with this --memory gives the text and keeps the promise; what each rank reports."""
    result = runs.run("--memory", memory, "--report", str(report))
    assert (result.code, result.our_lines) == (0, []), result.err
    assert result.out.split() == runs.text[:SOME]
    ranks: list[dict[str, Any]] = json.loads(report.read_text())["ranks"]
    for rank in ranks:
        assert rank["memory_bytes"] == parse_size(memory, "--memory")
        assert rank["peak_rss_bytes"] <= rank["memory_bytes"]
        assert max(point[1] for point in rank["timeline"]) <= rank["peak_rss_bytes"] + 4 * MB  # counters are not exact
        assert rank["timeline"] == sorted(rank["timeline"])
    return ranks


@pytest.mark.slow
@on_one_and_two_ranks
def test_the_smallest_that_is_named_works(runs: Runs, tmp_path: Path) -> None:
    _check_kept(runs, f"{runs.least} MB", tmp_path / "report")  # as it is written in the message


@on_one_and_two_ranks
@pytest.mark.slow
def test_about_the_smallest_works(runs: Runs, tmp_path: Path) -> None:
    for rank in _check_kept(runs, runs.little[1], tmp_path / "report"):
        assert rank["bytes_read"] >= SOME * rank["streamed_bytes_per_token"] > 0


@on_one_rank
@pytest.mark.parametrize("more", [7, 20, 45, 500])
@pytest.mark.slow_but("45-1")
def test_the_text_is_the_same_with_any_memory(runs: Runs, more: int, tmp_path: Path) -> None:
    (rank,) = _check_kept(runs, f"{runs.least + more}M", tmp_path / "report")
    streamed = rank["streamed_bytes_per_token"]
    assert (streamed == 0) == (more == 500)
    assert SOME * streamed <= rank["bytes_read"] - rank["pinned_bytes"] <= (SOME + 1) * streamed


@on_one_and_two_ranks
@pytest.mark.slow
def test_keys_and_values_are_written_and_read_within_it(runs: Runs, tmp_path: Path) -> None:
    """The cipher's library is counted in what is needed at least."""
    kept = (
        "--session",
        str(tmp_path / "s"),
        "--keep-cache",
        str(tmp_path / "kept"),
        "--report",
        str(tmp_path / "report"),
    )
    first = runs.run("--memory", "1M", *kept)
    match = re.search(r"this rank needs at least (\d+) MB", first.err)
    assert match, first.err
    least = int(match[1])
    assert runs.least < least < runs.least + 25
    for run in range(2):
        result = runs.run("--memory", f"{least + 2}M", *kept)
        assert (result.code, result.our_lines) == (0, []), result.err
        report = json.loads((tmp_path / "report").read_text())
        assert all(rank["peak_rss_bytes"] <= rank["memory_bytes"] for rank in report["ranks"])
        assert (report["answers"][0]["cached_tokens"] > SOME) == bool(run)
    assert result.out.split() != runs.text[:SOME], "it is another turn"


@on_one_and_two_ranks
@pytest.mark.slow
def test_a_batch_stays_within_it(runs: Runs, tmp_path: Path) -> None:
    """Of many more prompts than are answered at once, and of more at once than a chunk of a prompt has rows."""
    lines = [
        {"custom_id": f"{n}", "prompt": " ".join(str(3 + (n * 7 + i) % 500) for i in range(20)), "max_tokens": 6}
        for n in range(600)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = ["--batch-file", str(tmp_path / "in.jsonl"), "--report", str(tmp_path / "report"), "--raw", "--ignore-eos"]
    batch += ["--parallel", "24", "--prompt-chunk", "8", "--quiet", "--slices", str(runs.slices)]

    def run(memory: str, out: str) -> Result:
        arguments = ["-m", "tpimpi", *batch, "--memory", memory, "--out", str(tmp_path / out)]
        launcher = runs._launcher
        command = [sys.executable, *arguments] if launcher is None else launcher.command(runs.ranks, arguments)
        return run_command(command, env=runs.env)

    refused = run("1M", "never")
    match = re.search(r"this rank needs at least (\d+) MB .* or a smaller --parallel \(it is 24\)", refused.err)
    assert refused.code == 2 and match, refused.err
    result = run(f"{int(match[1]) + 8}M", "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "report").read_text())
    assert len((tmp_path / "out").read_text().splitlines()) == len(lines)
    assert all(rank["peak_rss_bytes"] <= rank["memory_bytes"] for rank in report["ranks"])


@on_two_ranks
@pytest.mark.slow
def test_a_size_for_each_rank(runs: Runs) -> None:
    result = runs.run("--memory", f"{runs.least + 10}M,{runs.least + 30}M")
    assert result.code == 0 and result.out.split() == runs.text[:SOME], result.err
    result = runs.run("--memory", f"{runs.least + 10}M,3M")
    assert (result.code, result.out, len(result.our_lines)) == (2, "", 1), result.err
    assert re.match(r"r1 \S+: --memory is 3 MB, this rank needs at least \d+ MB ", result.our_lines[0])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--memory", "1G,1G,1G"], "--memory has 3 sizes, this run has 2 ranks; "),
        (["--memory", "1G,"], "--memory is '1G,', must be auto, or one size, or a size for each rank"),
        (["--memory", "1G,auto"], "--memory is '1G,auto', must be auto, or one size, or a size for each rank"),
        (["--memory", "1G", "--window", "2"], "--window 2 and --memory 1G are both given; "),
        (["--memory", "auto", "--window", "all"], "--window all and --memory auto are both given; "),
    ],
)
def test_memory_that_makes_no_sense_is_one_line(
    on_ranks: Ranks, cache: dict[str, str], tiny: Path, options: list[str], line: str, tmp_path: Path
) -> None:
    cache = {**cache, "TPIMPI_CACHE": str(tmp_path)}  # what is there already of other tests would be said too
    arguments = ["-m", "tpimpi", "--model", str(tiny), "--prompt", "fox", "--max-tokens", "1", *options]
    result = on_ranks(2, *arguments, env=cache)
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.our_lines) == 1 and line in result.our_lines[0], result.err


@on_one_rank
@pytest.mark.parametrize("size", ["", "0", "-1G", "1e9", "700", "x" * 5000, "1G,1G"])
def test_no_size_is_one_line(runs: Runs, size: str) -> None:
    result = runs.run(f"--memory={size}")
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.err.splitlines()) == 1 and len(result.err) < 300
    assert result.err.startswith("tpimpi: --memory ")
