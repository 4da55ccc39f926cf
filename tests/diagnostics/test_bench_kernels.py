"""`bench kernels`: every row is there, ratios are right for given times, and bad input is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result
from tpimpi.compute.backends import BACKEND_NAMES
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.compute.formats.packed import packed_bytes
from tpimpi.diagnostics.bench.kernels import TORCH, Limits, Timing, make_rows, print_table
from tpimpi.system.cpu import amx_extensions, last_level_cache

pytestmark = pytest.mark.alone

SMALL = ["bench", "kernels", "--shape", "96x64", "--seconds", "0.001"]
LIMITS = Limits(read_bandwidth=25e9, multiply_peak={"f32": 1e11, "bf16": 2e11, "int8": 4e11})


def test_ratios_of_given_times() -> None:
    timings = [
        Timing("native", "q4_0", 1, 20_000_000, [0.004, 0.001, 0.002]),  # the median is 2 ms
        Timing("native", "q4_0", 8, 20_000_000, [0.003]),
        Timing("native", "bf16", 8, 80_000_000, [0.008, 0.004]),
        Timing(TORCH, "f32", 1, 160_000_000, [0.02]),
    ]
    one, eight, other, torchs = make_rows(timings, 10_000, 4_000, LIMITS)
    assert (one.backend, one.format, one.positions, one.calls, one.seconds) == ("native", "q4_0", 1, 3, 0.002)
    assert one.gb_per_s == pytest.approx(10)
    assert one.of_read_bandwidth == pytest.approx(0.4)
    assert one.gflop_per_s == pytest.approx(40)  # 2 * 40e6 operations in 2 ms
    assert one.of_multiply_peak == pytest.approx(0.1)
    assert one.of_one_position == 1
    assert eight.gflop_per_s == pytest.approx(2 * 40e6 * 8 / 0.003 / 1e9)
    assert eight.of_one_position == pytest.approx(1.5)
    assert eight.calls == 1
    assert other.seconds == pytest.approx(0.006)
    assert other.of_multiply_peak == pytest.approx(2 * 40e6 * 8 / 0.006 / 2e11)
    assert other.of_one_position is None, "one position was not timed"
    assert torchs.of_one_position == 1, "torch is compared with itself"
    assert torchs.of_multiply_peak == pytest.approx(2 * 40e6 / 0.02 / 1e11)


def test_ratios_to_limits_that_were_not_measured() -> None:
    (row,) = make_rows([Timing("torch", "q8_0", 1, 100, [0.5])], 10, 10, Limits(None, {}))
    assert (row.of_read_bandwidth, row.of_multiply_peak) == (None, None)
    assert row.gb_per_s == pytest.approx(200e-9)


def test_amx_is_named_where_the_processor_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu amx_tile amx_int8 avx2 amx_bf16\n\nflags\t\t: fpu\n")
    (tmp_path / "other").write_text("model name : x\nflags\t\t: fpu avx2\n")
    assert amx_extensions(tmp_path / "cpuinfo") == ["amx_bf16", "amx_int8"]
    assert amx_extensions(tmp_path / "other") == amx_extensions(tmp_path / "none") == []
    rows = make_rows([Timing("native", "f32", 1, 100, [0.5])], 10, 10, LIMITS)
    print_table(rows, "title", LIMITS, ["amx_bf16"])
    assert "has AMX (amx_bf16): the peak is without it" in capsys.readouterr().out
    print_table(rows, "title", LIMITS, [])
    assert "AMX" not in capsys.readouterr().out


def test_the_last_level_cache_is_found(tmp_path: Path) -> None:
    def cache(cpu: int, index: int, level: int, size: str, shared: str) -> None:
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")

    assert last_level_cache(1, tmp_path) == 32 << 20, "where the system does not say"
    for cpu in range(4):
        cache(cpu, 0, 1, "32K", str(cpu))
        cache(cpu, 3, 3, "16M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache(1, tmp_path) == 16 << 20
    assert last_level_cache(2, tmp_path) == 32 << 20
    assert last_level_cache(4, tmp_path) == 32 << 20


@pytest.mark.slow_but("None")
@pytest.mark.parametrize("backend", [None, *(name for name in BACKEND_NAMES if name not in ("auto", "native"))])
def test_every_row_is_there(tpimpi: Callable[..., Result], tmp_path: Path, backend: str | None) -> None:
    report = tmp_path / "bench.json"
    chosen = [] if backend is None else ["--backend", backend]
    result = tpimpi(*SMALL, "--positions", "3,1", "--json", str(report), *chosen)
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    ours = found["rows"][0]["backend"]
    assert backend in (None, ours)
    expected = [(ours, fmt, n) for fmt in WEIGHT_FORMATS for n in (1, 3)]
    expected += [(TORCH, fmt, n) for fmt in ("f32", "bf16") for n in (1, 3)]
    assert [(row["backend"], row["format"], row["positions"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert row["calls"] >= 5
        assert row["seconds"] > 0
        assert row["gflop_per_s"] == pytest.approx(2 * 96 * 64 * row["positions"] / row["seconds"] / 1e9)
        weights = {"f32": 96 * 64 * 4, "bf16": 96 * 64 * 2}.get(row["format"]) or packed_bytes(row["format"], 96, 64)
        assert row["gb_per_s"] == pytest.approx(weights / row["seconds"] / 1e9)
        assert row["of_one_position"] == 1 if row["positions"] == 1 else row["of_one_position"] > 0
    assert (found["shape"], found["threads"]) == ([96, 64], 1)
    assert {"cpu", "cores", "last_level_cache_bytes", "kernel_level", "versions"} <= set(found["machine"])
    assert {"tpimpi", "python", "numpy", "torch"} == set(found["machine"]["versions"])
    if ours == "native":
        assert found["read_bandwidth"] > 0
        assert set(found["multiply_peak"]) == {"f32", "bf16", "int8"}
        assert all(row["of_read_bandwidth"] > 0 and row["of_multiply_peak"] > 0 for row in found["rows"])
    # The table: a line for each row.
    seconds = len(expected) * 0.001
    assert f"timing {len(expected)} kernels for 0.001 s each: {seconds:.0f} s at least" in result.err
    assert re.search(r"^round 5 of 5, about \d+ s left$", result.err, re.MULTILINE)
    lines = [line for line in result.out.splitlines() if re.match(rf"({ours}|{TORCH}) +\w+ +\d+ ", line)]
    assert len(lines) == len(expected), result.out


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["bench"], "the following arguments are required: kernels"),
        (["bench", "disks"], "invalid choice: 'disks'"),
        ([*SMALL, "--formats", "f32,q9"], "--formats has 'q9', must be some of f32, bf16, f16, q8_0, q4_0, q4_1, q6_k"),
        ([*SMALL, "--formats", ""], "--formats has ''"),
        ([*SMALL, "--positions", "1,0"], "--positions has '0', must be a whole number from 1 to 65536"),
        ([*SMALL, "--positions", "1,,2"], "--positions has ''"),
        ([*SMALL, "--positions", "9" * 5000], "--positions has '999"),
        (["bench", "kernels", "--shape", "4096"], "--shape is '4096', must be rows and columns, such as 11008x4096"),
        (["bench", "kernels", "--shape", "0x4096"], "--shape has '0', must be a whole number from 1 to 1048576"),
        (
            ["bench", "kernels", "--shape", "1000000x1000000"],
            r"the matrices take [\d.]+ GB, this machine has [\d.]+ GB",
        ),
        ([*SMALL, "--threads", "0"], "--threads is 0, must be 1 to 1024"),
        ([*SMALL, "--seconds", "0"], "--seconds is 0, must be a number over 0"),
        ([*SMALL, "--seconds", "nan"], "--seconds is nan"),
        ([*SMALL, "--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder /nowhere"),
        ([*SMALL, "--backend", "cuda"], "--backend: invalid choice: 'cuda'"),
    ],
)
def test_bad_input_is_one_line(tpimpi: Callable[..., Result], arguments: list[str], pattern: str) -> None:
    result = tpimpi(*arguments)
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.our_lines) == 1, result.err
    assert re.search(pattern, result.our_lines[0]), result.our_lines[0]


def test_help(tpimpi: Callable[..., Result]) -> None:
    result = tpimpi("bench", "--help")
    assert (result.code, result.err) == (0, "")
    assert {"--formats", "--positions", "--shape", "--json"} <= set(result.out.split())
