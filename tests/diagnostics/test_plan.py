"""LinkMeasurement ranks, `plan` and `--shares auto`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.launch import Launcher, Result
from tests.support.prediction import WORKLOAD, predictor, speed
from tests.support.ranks import Ranks
from tpimpi.diagnostics.options import MeasureOptions
from tpimpi.diagnostics.planner import command
from tpimpi.diagnostics.planner.command import Survey, _weights, as_measured, choose_shares, make_table
from tpimpi.diagnostics.planner.costs import RankSpeed
from tpimpi.diagnostics.planner.layer_benchmark import LayerTiming, sustained
from tpimpi.diagnostics.planner.measure_layers import RankMeasurement
from tpimpi.diagnostics.planner.predict import Predictor
from tpimpi.diagnostics.planner.prediction import Prediction
from tpimpi.diagnostics.planner.table import PlanRow, advice, seconds_text
from tpimpi.engine.ranks import RankInfo
from tpimpi.star import Star
from tpimpi.system.memory import Place

MB = 10**6


def measurement(rank: int, timings: list[LayerTiming]) -> RankMeasurement:
    head = (10 * MB, 0.002, 0.001) if rank == 0 else None
    return RankMeasurement(
        *(rank, f"host{rank}", 2, "native", 1.5, timings, head, 80 * MB, [("", 1000, 500), ("job", 700, 700)], "star")
    )


def prediction(seconds: float, shares: str = "1", problem: str = "") -> Prediction:
    return Prediction(shares, seconds, *[0.0] * 6, "compute", 0, (), (), problem)


# From what was measured to what is predicted with


def test_what_was_found_becomes_lines() -> None:
    """Rank 1 is the slower: of a step of 7 ms (of the smaller size 5) it computes 5 (3): two allreduces of 1 each."""
    first = [LayerTiming(1, 8 * MB, 7e-3, 3e-3, 4e-3), LayerTiming(1, 2 * MB, 5e-3, 1.5e-3, 2e-3)]
    second = [LayerTiming(1, 8 * MB, 7e-3, 5e-3, 6e-3), LayerTiming(1, 2 * MB, 5e-3, 3e-3, 3e-3)]
    chunk = [LayerTiming(16, 8 * MB, 30e-3, 24e-3, 25e-3), LayerTiming(16, 2 * MB, 12e-3, 6e-3, 7e-3)]
    measured = as_measured([measurement(0, first + chunk), measurement(1, second + chunk)], 16)
    fast, slow = measured.ranks
    assert fast.token.wall.fixed == pytest.approx(1e-3)
    assert fast.token.wall.per_byte * 8 * MB == pytest.approx(2e-3)
    assert slow.token.cpu.seconds(8 * MB) == pytest.approx(6e-3) and slow.token.cpu.seconds(2 * MB) == pytest.approx(
        3e-3
    )
    assert fast.chunk.wall.seconds(5 * MB) == pytest.approx(15e-3)
    assert measured.allreduce_s == pytest.approx(1e-3)
    assert measured.allreduce_chunk_s == pytest.approx(3e-3)
    assert measured.head.seconds(20 * MB) == pytest.approx(4e-3) and measured.head_cpu.seconds(
        20 * MB
    ) == pytest.approx(2e-3)
    assert fast.places == (Place("", 1000, 500), Place("job", 700, 700))
    assert (slow.host, slow.processors, slow.base, slow.threads) == ("host1", 1.5, 80 * MB, 2)


def test_one_rank_has_no_allreduce() -> None:
    measured = as_measured(
        [measurement(0, [LayerTiming(1, 8 * MB, 7e-3, 3e-3, 4e-3), LayerTiming(1, 2 * MB, 5e-3, 1e-3, 2e-3)])], 1
    )
    assert measured.allreduce_s == measured.allreduce_chunk_s == 0
    assert measured.ranks[0].chunk == measured.ranks[0].token


def test_processors_are_counted_over_whole_periods_of_being_stopped() -> None:
    """Pieces of 1 ms; after the first 8, for which time was saved up, 2 of them in each 10 ms."""
    wall = cpu = 0.0
    marks = [(wall, cpu)]
    for _ in range(8):
        wall, cpu = wall + 1e-3, cpu + 1e-3
        marks.append((wall, cpu))
    for piece in range(20):
        wall, cpu = wall + (9e-3 if piece % 2 == 0 else 1e-3), cpu + 1e-3
        marks.append((wall, cpu))
    assert sustained(marks) == pytest.approx(0.2, rel=0.01)
    assert sustained(marks[:9]) == pytest.approx(1.0)


def test_two_threads_are_two_processors() -> None:
    assert sustained([(1e-3 * n, 2e-3 * n) for n in range(50)]) == pytest.approx(2.0)


# Plans that stream


class Stand:
    """A survey of two ranks as fast as `speeds`, whose disks give 1 MB/s, though that is not known before they are measured;
    rank 1 may take `spare` bytes more than equal shares need."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: list[RankSpeed], spare: int) -> None:
        needed = predictor(*speeds).predict([1, 1]).memory[1]
        self.workload = replace(WORKLOAD, memory=(8000 * MB, needed + spare))
        self.times_measured = 0
        guests = [RankInfo(speed.host, frozenset({rank}), 2, native=True) for rank, speed in enumerate(speeds)]
        self.survey = Survey(Star(None), guests, self.workload, MeasureOptions("native", 1, "star", "f32"))
        monkeypatch.setattr(self.survey, "predictor", lambda ranks, positions=1: self._predictor(speeds[:ranks]))
        monkeypatch.setattr(command, "measure_disks", self._disks)

    def _predictor(self, speeds: list[RankSpeed]) -> Predictor:
        return predictor(*speeds, workload=self.workload)

    def _disks(self, star: Star) -> list[tuple[float, float]]:
        self.times_measured += 1
        return [(1e6, 0.0)] * 2


def test_slices_that_are_there_are_predicted_with_the_disk_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With shares 7,9 rank 1 computes 9/8 as long as with equal ones, which would be good enough; but it had to read over
    10 MB for each token, ten seconds."""
    stand = Stand(monkeypatch, [speed(1.0), speed(1.0)], spare=MB)
    monkeypatch.setattr(command, "find_slices", lambda star, before, after: ["7-9"])
    assert choose_shares(stand.survey, 2, ("", ""), quiet=False) == [1.0, 1.0]
    assert capsys.readouterr().err.startswith("shares: 1,1 (auto; predicted ")
    assert stand.times_measured == 1
    roomy = Stand(monkeypatch, [speed(1.0), speed(1.0)], spare=1000 * MB)
    assert choose_shares(roomy.survey, 2, ("", ""), quiet=True) == [7.0, 9.0]
    assert roomy.times_measured == 0


def test_equal_shares_are_said_with_the_disk_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best are 3,1, which fit. Equal ones lack 50 MB on rank 1."""
    stand = Stand(monkeypatch, [speed(1.0), speed(3.0)], spare=-50 * MB)
    assert choose_shares(stand.survey, 2, None, quiet=False) == [3.0, 1.0]
    said = re.search(r"equal shares ([0-9.]+)\)", capsys.readouterr().err)
    assert said is not None and float(said[1]) >= 50


def test_given_shares_are_predicted_with_the_disk_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, [speed(1.0), speed(1.0)], spare=MB)
    lines = make_table(stand.survey, 2, [7.0, 9.0], quiet=True)
    assert [(line.ranks, line.kind, any(line.prediction.streamed)) for line in lines] == [
        (1, "equal", False),
        (2, "equal", False),
        (2, "given", True),
    ]
    assert lines[2].prediction.limit == "disk" and lines[2].prediction.s_per_token > 10
    assert stand.times_measured == 1


# Words


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("3-2-2", [3.0, 2.0, 2.0]),
        ("0-1-1", [0.0, 1.0, 1.0]),
        ("0.5-1-1", [0.5, 1.0, 1.0]),
        ("3-2", None),
        ("3.0-2-2", None),
        ("3-ranks-8f3a", None),
        ("nan-1-1", None),
        ("0-0-0", None),
        ("", None),
    ],
)
def test_shares_in_the_name_of_a_folder(text: str, weights: list[float] | None) -> None:
    assert _weights(text, 3) == weights


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.02341, "0.0234"), (0.2341, "0.234"), (2.341, "2.34"), (23.41, "23.4"), (234.1, "234"), (0, "0")],
)
def test_three_digits_of_a_time(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_fewer_ranks_that_are_faster_are_recommended() -> None:
    lines = [
        PlanRow(1, "equal", prediction(0.3)),
        PlanRow(2, "equal", prediction(0.15, "1,1")),
        PlanRow(2, "best", prediction(0.12, "2,1")),
        PlanRow(3, "equal", prediction(0.2, "1,1,1")),
        PlanRow(3, "best", prediction(0.19, "3,2,2")),
    ]
    assert advice(lines) == [
        "2 ranks are faster than 3 here: 0.120 against 0.190 s/token; use -np 2",
        "best for -np 2: --shares 2,1",
    ]
    assert advice(lines[:3]) == ["best for -np 2: --shares 2,1"]
    assert advice(lines[:2]) == []
    assert advice([*lines[:1], PlanRow(2, "equal", prediction(0.302, "1,1"))]) == ["1 rank is as fast as 2 here"]


def test_ranks_that_cannot_work_are_named() -> None:
    lines = [
        PlanRow(1, "equal", prediction(0.3)),
        PlanRow(2, "equal", prediction(float("inf"), "1,1", "r1 pi has 60 MB")),
    ]
    assert advice(lines) == ["2 ranks cannot work here; use -np 1"]
    assert advice(lines[1:]) == []


# The command


def row_of(out: str, ranks: int, shares: str) -> list[str] | None:
    """The cells of the table's line for these shares."""
    rows = (line.split() for line in out.splitlines())
    return next((row for row in rows if row[:2] == [str(ranks), shares]), None)


def test_plan_of_one_rank(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    found = tpimpi("plan", "--model", str(tiny), "--format", "f32", "--prompt-tokens", "5", "--json", str(report))
    assert found.code == 0, found.err
    row = row_of(found.out, 1, "1")
    assert row is not None and float(row[2]) > 0 and row[5] == "0"
    assert found.err == "measuring 1 of 1 ranks\n"
    written = json.loads(report.read_text())
    assert written["prompt_tokens"] == 5 and written["formats"] == "f32"
    (plan,) = written["plans"]
    assert (plan["ranks"], plan["kind"], plan["shares"], plan["streamed"]) == (1, "equal", "1", [0])
    assert plan["s_per_token"] >= plan["compute_s"] + plan["head_s"] > 0
    assert plan["first_token_s"] > 0


@pytest.mark.slow
def test_plan_of_a_prompt_that_is_computed_in_halves(on_ranks: Ranks, tmp_path: Path, cache: dict[str, str]) -> None:
    """From 32 positions on a chunk is computed in two halves: which the layers that stand in for a model's have to allow."""
    report = tmp_path / "plan.json"
    arguments = ("--shape", "tinyllama-1.1b", "--layers", "2", "--prompt-tokens", "40", "--json", str(report))
    found = on_ranks(2, "-m", "tpimpi", "plan", *arguments, env=cache)
    assert found.code == 0, found.err
    plans = json.loads(report.read_text())["plans"]
    assert {plan["ranks"] for plan in plans} == {1, 2}
    for plan in plans:
        assert plan["first_token_s"] > 0 and plan["s_per_token"] > 0


def test_plan_of_three_ranks(mpirun: Launcher, tmp_path: Path, cache: dict[str, str]) -> None:
    report = tmp_path / "plan.json"
    arguments = ("--shape", "llama-2-7b", "--layers", "2", "--shares", "5,4,3", "--threads", "1", "--json", str(report))
    found = mpirun(3, "-m", "tpimpi", "plan", *arguments, env=cache)  # its memory is that of processes of their own
    assert found.code == 0, found.err
    for ranks in (1, 2, 3):
        row = row_of(found.out, ranks, ",".join("1" * ranks))
        assert row is not None and float(row[2]) > 0
        assert (float(row[5]) > 0) == (ranks > 1)
    assert row_of(found.out, 3, "5,4,3") is not None
    plans = json.loads(report.read_text())["plans"]
    equal = [plan for plan in plans if plan["kind"] == "equal"]
    # Every rank holds its part of 2 layers of 114 MB (q4_0), rank 0 the head (139 MB in q8_0) too, and all some 100 MB more.
    assert [len(plan["memory"]) for plan in equal] == [1, 2, 3]
    assert 350e6 < equal[0]["memory"][0] < 800e6
    assert equal[2]["memory"][0] - equal[2]["memory"][1] == pytest.approx(139e6, rel=0.3)
    assert not (Path(cache["TPIMPI_CACHE"]) / "llama-2-7b").exists()
    for plan in plans:
        assert plan["s_per_token"] >= 0.999 * (plan["compute_s"] + plan["star_s"] + plan["head_s"])
    for ranks in (1, 2, 3):
        kinds = {plan["kind"]: plan["s_per_token"] for plan in plans if plan["ranks"] == ranks}
        assert kinds.get("best", 0) <= kinds["equal"]


def test_a_plan_that_streams_measures_the_disk(tpimpi: Callable[..., Result], tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    arguments = ("--shape", "llama-2-7b", "--layers", "4", "--memory", "400M", "--context", "64", "--json", str(report))
    found = tpimpi("plan", *arguments, "--quiet", env={"TPIMPI_CACHE": str(tmp_path / "cache")})
    assert found.code == 0 and found.err == ""
    (plan,) = json.loads(report.read_text())["plans"]
    # 595 MB of tiles, of which 400 MB, less what the program takes, can be pinned.
    assert 250e6 < plan["streamed"][0] < 595e6
    assert plan["memory"][0] <= 400e6
    assert plan["disk_s"] > 0.001
    assert plan["s_per_token"] >= plan["disk_s"]
    assert list((tmp_path / "cache").iterdir()) == []  # the file that was read has gone


def test_ranks_without_room_are_said(tpimpi: Callable[..., Result]) -> None:
    found = tpimpi("plan", "--shape", "llama-2-7b", "--layers", "2", "--memory", "90M")
    assert found.code == 0
    assert row_of(found.out, 1, "1") == ["1", "1", *["-"] * 7, "memory"]
    assert re.search(r"^1 rank: r0 \S+ has 90 MB, this rank needs at least \d+ MB", found.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "llama-9"], "--shape is 'llama-9', must be one of "),
        (["--shape", "llama-2-7b", "--model", "x"], "--model and --shape are both given; give one of them"),
        (["--layers", "3"], "--layers is for --shape; leave it out, or name a shape"),
        (["--shape", "llama-2-7b", "--shares", "1,2"], "--shares is '1,2', must be 1 number: there is 1 rank"),
        (["--shape", "llama-2-7b", "--prompt-tokens", "0"], "--prompt-tokens is 0, must be 1 or more"),
        (
            ["--shape", "llama-2-7b", "--prompt-tokens", "4096"],
            "--prompt-tokens is 4096, this model has 4096 positions; ",
        ),
        (
            ["--shape", "llama-2-7b", "--context", "5000"],
            "--context is 5000, this model has 4096 positions; give at most",
        ),
        (["--shape", "llama-2-7b", "--memory", "1G,2G"], "--memory has 2 sizes, this run has 1 ranks; "),
        (["--shape", "llama-2-7b", "--format", "q3"], "--format is 'q3', must be auto, f32"),
        (
            ["--shape", "llama-2-7b", "--json", "/proc/nowhere/plan.json"],
            "--json /proc/nowhere/plan.json: there is no folder",
        ),
    ],
)
def test_bad_input_is_one_line(tpimpi: Callable[..., Result], arguments: list[str], said: str) -> None:
    found = tpimpi("plan", *arguments)
    assert found.code == 2
    (line,) = found.err.splitlines()
    assert line.startswith(f"tpimpi: {said}"), line


def test_bad_input_under_mpirun_is_one_line(on_ranks: Ranks, cache: dict[str, str]) -> None:
    found = on_ranks(2, "-m", "tpimpi", "plan", "--shape", "llama-2-7b", "--shares", "1", env=cache)
    assert found.code != 0
    (line,) = found.our_lines
    assert "--shares is '1', must be 2 numbers with commas between them" in line


# --shares auto


SHARES = re.compile(r"^shares: (\S+) \(auto(, sliced already)?; predicted [0-9.]+ s/token", re.MULTILINE)


def test_auto_shares_are_said_used_and_used_again(on_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    env = {"TPIMPI_CACHE": str(tmp_path / "cache"), "TPIMPI_MODEL": ""}
    arguments = ("-m", "tpimpi", "--model", str(tiny), "--format", "f32", "--prompt", "the fox", "--max-tokens", "4")
    usual = on_ranks(2, *arguments, "--quiet", env=env | {"TPIMPI_CACHE": str(tmp_path / "other")})
    first = on_ranks(2, *arguments, "--shares", "auto", env=env)
    assert first.code == 0, first.err
    said = SHARES.search(first.err)
    assert said is not None and said[2] is None
    assert first.out == usual.out
    folders = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "tokenizers"]
    assert len(folders) == 1 and f"-{said[1].replace(',', '-')}-v" in folders[0]
    assert said[1] in first.err
    # And again: these slices are taken unless others are predicted to be much faster, which noise may make them seem.
    again = on_ranks(2, *arguments, "--shares", "auto", env=env)
    assert again.code == 0 and again.out == usual.out
    said_again = SHARES.search(again.err)
    assert said_again is not None and (said_again[2] is not None) == (said_again[1] == said[1])


@pytest.mark.slow
def test_auto_shares_of_slices(on_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    env = {"TPIMPI_CACHE": str(tmp_path / "cache"), "TPIMPI_MODEL": ""}
    out = tmp_path / "slices"
    found = on_ranks(2, "-m", "tpimpi", "slice", "--model", str(tiny), "--shares", "auto", "--out", str(out), env=env)
    assert found.code == 0, found.err
    said = SHARES.search(found.err)
    assert said is not None and f"shares {said[1]})" in found.err
    assert sorted(path.name for path in out.glob("*.h5")) == ["rank-0-of-2.h5", "rank-1-of-2.h5"]


def test_auto_shares_of_one_rank_measure_nothing(tpimpi: Callable[..., Result], tiny: Path) -> None:
    found = tpimpi("--model", str(tiny), "--shares", "auto", "--prompt", "the fox", "--max-tokens", "1")
    assert found.code == 0 and "shares:" not in found.err


def test_auto_shares_want_the_ranks(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    found = tpimpi("slice", "--model", str(tiny), "--ranks", "2", "--shares", "auto", "--out", str(tmp_path / "out"))
    assert found.code == 2
    assert found.err.startswith(
        "tpimpi: --shares auto measures the ranks' machines: start it with mpirun, or give numbers"
    )
    found = tpimpi("--slices", str(tmp_path), "--shares", "auto", "--prompt", "x")
    assert found.code == 2
    assert found.err.startswith(
        "tpimpi: --shares auto chooses shares for slices that are yet to be made; leave out --slices"
    )
