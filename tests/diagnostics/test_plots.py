"""Pictures: that they are drawn, of what they should show, and refused before the work where they cannot be."""

from __future__ import annotations

import re
import struct
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import ROOT, run_command
from tpimpi.cli.run_options import parse_run
from tpimpi.diagnostics import plots
from tpimpi.diagnostics.plots import Line, Timeline, check_plot, plot_lines, plot_memory, plot_trace, read_trace
from tpimpi.diagnostics.trace_file import chrome_trace, write_trace
from tpimpi.engine.trace import COMPUTE, READ, STAR, WAIT, RankTrace, Recorder
from tpimpi.errors import InputError, StorageError

RED = (0xC5, 0x30, 0x30)  # of the promise, and of waiting
BLUE, ORANGE, GREY = (0x2B, 0x6C, 0xB0), (0xED, 0x89, 0x36), (0xCB, 0xD5, 0xE0)
HOSTILE = "r1 $x_{1}$ <b>&\u4e16\x1b[31m" + "y" * 200


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header (PNG specification, 5.2 and 11.2.2)."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    length, kind, width, height = struct.unpack(">I4sII", data[8:24])
    assert (length, kind) == (13, b"IHDR")
    assert data[-8:-4] == b"IEND"
    return width, height


def pixels(path: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """[height, width]: where the picture has just this colour."""
    from matplotlib.image import imread

    return (np.rint(imread(path)[:, :, :3] * 255) == colour).all(axis=2)


def timeline(rank: int, promise: int | None = 700_000_000) -> Timeline:
    points = [[5000 + t / 10, 600e6 + t * 1e4, 400e6, 80e6] for t in range(200)]
    return Timeline(f"r{rank} pi-{rank}", points, promise)


# Lines


@pytest.mark.parametrize(("panels", "size"), [(1, (870, 660)), (3, (2190, 660)), (4, (1530, 1200)), (5, (2190, 1200))])
def test_lines_stand_in_rows_of_panels_and_nothing_is_cut_off(
    tmp_path: Path, panels: int, size: tuple[int, int]
) -> None:
    lines = [Line(f"{number} " + "w" * 22, [1, 8], [number + 1, 30]) for number in range(7)]
    plot_lines([(f"panel {number}", lines) for number in range(panels)], tmp_path / "lines.png", ("x", "y"))
    assert png_size(tmp_path / "lines.png") == size
    white = pixels(tmp_path / "lines.png", (255, 255, 255))
    assert white[:, 0].all() and white[:, -1].all() and white[0].all() and white[-1].all()


@pytest.mark.parametrize(
    ("top", "numbers"), [(30.0, ["1", "2", "5", "10", "20"]), (1e6, ["1", "10", "100", "1000", "10000", "100000"])]
)
def test_a_short_axis_has_more_numbers_than_powers_of_ten(tmp_path: Path, top: float, numbers: list[str]) -> None:
    plot_lines([("panel", [Line("a line", [3, 4], [1, top])])], tmp_path / "lines.svg", ("", ""), ticks=(3,))
    shown = re.findall(r">(\d+)</text>", (tmp_path / "lines.svg").read_text(encoding="utf-8"))
    assert [number for number in shown if number != "3"][: len(numbers)] == numbers


# Memory


@pytest.mark.parametrize(("ranks", "size"), [(1, (1050, 540)), (3, (1530, 540)), (8, (2040, 930)), (30, (2040, 2490))])
def test_a_panel_for_each_rank(tmp_path: Path, ranks: int, size: tuple[int, int]) -> None:
    plot_memory([timeline(rank) for rank in range(ranks)], tmp_path / "memory.png")
    assert png_size(tmp_path / "memory.png") == size
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]


def test_pinned_buffers_and_the_rest_lie_on_one_another(tmp_path: Path) -> None:
    plot_memory([timeline(0)], tmp_path / "memory.png")
    blue, orange, grey = (pixels(tmp_path / "memory.png", colour) for colour in (BLUE, ORANGE, GREY))
    column = blue.shape[1] // 3
    heights = [int(picture[60:, column].sum()) for picture in (blue, orange, grey)]
    assert heights[0] / heights[1] == pytest.approx(400 / 80, rel=0.05)
    assert heights[0] / heights[2] == pytest.approx(400 / 120, rel=0.05)
    tops = [int(np.flatnonzero(picture[60:, column])[0]) for picture in (grey, orange, blue)]
    assert tops == sorted(tops)


def test_a_promise_is_a_line_where_it_is_near(tmp_path: Path) -> None:
    reds = {}
    for promise in (None, 700_000_000, 64_000_000_000):
        plot_memory([timeline(0, promise)], tmp_path / "memory.png")
        reds[promise] = int(pixels(tmp_path / "memory.png", RED).sum())
    assert reds[None] == reds[64_000_000_000] == 0
    assert reds[700_000_000] > 200


def test_odd_timelines_are_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """None, one point, nothing in memory at all, and names that matplotlib would take for mathematics."""
    odd = [
        Timeline(HOSTILE, [], 10**9),
        Timeline("_hidden", [[1.0, 1e8, 5e7, 1e7]]),
        Timeline("r2 a$b", [[1.0, 0, 0, 0], [2.0, 0, 0, 0]], 0),
        Timeline("less resident than counted", [[1.0, 1e6, 5e6, 1e6], [2.0, 1e6, 5e6, 1e6]]),
    ]
    plot_memory(odd, tmp_path / "memory.png")
    plot_memory(odd[:1], tmp_path / "empty.png")
    assert png_size(tmp_path / "memory.png") == (1050, 930)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("target", ["/nowhere/memory.png", "/dev/full"])
def test_a_plot_that_cannot_be_written_is_a_storage_error(target: str) -> None:
    with pytest.raises(StorageError, match=f"cannot write {target}: .*choose another --plot"):
        plot_memory([timeline(0)], Path(target))


def checked(*arguments: str) -> None:
    parse_run(arguments)


def test_targets_are_refused_before_the_work(tmp_path: Path) -> None:
    prompt, notes, old = tmp_path / "prompt.png", tmp_path / "notes.png", tmp_path / "old.png"
    prompt.write_bytes(b"\x89PNG\r\n\x1a\n")
    notes.write_text("mine")
    plot_memory([timeline(0)], old)
    for target, what in [
        ("", "--plot is empty"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "none" / "m.png"), "there is no folder"),
        (str(tmp_path / "m.svg"), "the picture is a PNG; give a name that ends in .png"),
        (str(notes), "is there, and is no PNG picture"),
        (str(prompt), "is a file that this run reads"),
    ]:
        with pytest.raises(InputError, match=what):
            checked("--prompt-file", str(prompt), "--plot", target)
    with pytest.raises(InputError, match="--trace and --plot are both"):
        checked("--plot", str(tmp_path / "x.png"), "--trace", str(tmp_path / "x.png"))
    checked("--prompt-file", str(prompt), "--plot", str(old), "--trace", str(tmp_path / "t.json"))
    assert notes.read_text() == "mine"


def test_without_matplotlib_it_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"--plot needs matplotlib.*pip install 'matplotlib>=3\.8'"):
        checked("--plot", str(tmp_path / "m.png"))
    checked("--trace", str(tmp_path / "t.json"))  # needs none


def test_options_alone_do_not_bring_matplotlib() -> None:
    """It takes 50 MB, which no run without --plot should pay."""
    program = (
        "import sys, tpimpi.cli.run_options; from tpimpi.diagnostics.plots import check_plot; check_plot('x.png');"
        "print('matplotlib' in sys.modules)"
    )
    result = run_command([sys.executable, "-c", program], env={})
    assert (result.code, result.out) == (0, "False\n"), result.err


# A stretch of a trace


def ranks() -> list[RankTrace]:
    """Two ranks: reads of 10 ms, each followed by compute of 6 ms; the second rank's clock is 100 s behind."""
    made = []
    for rank, start in enumerate((1000.0, 900.0)):
        recorder = Recorder()
        for index in range(20):
            began = start + index * 0.010
            recorder.add(READ, index % 2, index, began, began + 0.010, rank)
            recorder.add(COMPUTE, index % 2, index, began + 0.010, began + 0.016)
            recorder.add(STAR, index % 2, -1, began + 0.016, began + 0.017)
            recorder.add(WAIT, index % 2, index, began + 0.017, began + 0.020)
        made.append(RankTrace(rank, ["desk", HOSTILE][rank], 100.0 * rank, recorder.pack(), []))
    return made


def test_a_stretch_is_drawn_with_a_lane_for_each_kind(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", ranks(), ["layer 0 attn", "layer 0 mlp"])
    plot_trace(tmp_path / "trace.json", tmp_path / "a.svg", 0.05, 0.1)
    plot_trace(chrome_trace(ranks(), ["layer 0 attn", "layer 0 mlp"]), tmp_path / "b.svg", 0.05, 0.1)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    root = ET.parse(tmp_path / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("r0 desk", "milliseconds from 0.05 s of the trace", "0 mlp"):
        assert text in texts
    assert [texts.count(lane) for lane in ("read", "compute", "star", "disk wait", "2 at once")] == [2, 2, 2, 2, 0]
    assert any(text.startswith("r1 r1 $x_{1}$ <b>&") for text in texts)


def test_reads_take_as_many_lanes_as_there_are_at_once(tmp_path: Path) -> None:
    recorder = Recorder()
    for lane, began in enumerate((0.0, 0.5, 1.0, 1.5, 2.0, 2.5)):  # six threads, of which two read at any time
        recorder.add(READ, 0, lane, began, began + 1.0, lane)
    trace = chrome_trace([RankTrace(0, "h", 0.0, recorder.pack(), [])], ["layer 0 attn"])
    plot_trace(trace, tmp_path / "x.svg", 0.0, 4.0)
    root = ET.parse(tmp_path / "x.svg").getroot()
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ("read" in texts, "2 at once" in texts, "3 at once" in texts) == (True, True, False)


def test_bars_are_as_long_as_their_spans(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.add(READ, 0, 0, 10.0, 10.5)
    recorder.add(WAIT, 0, 0, 10.5, 10.75)
    recorder.add(WAIT, 0, 1, 11.5, 13.0)  # a stretch of it lies outside
    trace = chrome_trace([RankTrace(0, "h", 0.0, recorder.pack(), [])], ["layer 0 attn"])
    plot_trace(trace, tmp_path / "trace.png", 0.0, 2.0)
    width, _ = png_size(tmp_path / "trace.png")
    orange, red = pixels(tmp_path / "trace.png", ORANGE), pixels(tmp_path / "trace.png", RED)
    longest = int(orange.any(axis=0).sum())
    assert longest > width / 6
    assert int(red.any(axis=0).sum()) == pytest.approx(longest * (0.25 + 0.5) / 0.5, rel=0.03)
    assert np.flatnonzero(orange.any(axis=1)).max() < np.flatnonzero(red.any(axis=1)).min(), "reading is the upper lane"


@pytest.mark.parametrize(
    ("begin", "end", "name", "what"),
    [
        (0.0, 0.1, "x.gif", "must end in .svg or .png"),
        (0.1, 0.1, "x.svg", "has no length"),
        (float("nan"), 0.1, "x.svg", "has no length"),
        (0.0, float("inf"), "x.svg", "has no length"),
        (7.0, 8.0, "x.svg", "has no spans"),
    ],
)
def test_a_stretch_that_cannot_be_drawn_is_refused(
    tmp_path: Path, begin: float, end: float, name: str, what: str
) -> None:
    with pytest.raises(InputError, match=what):
        plot_trace(chrome_trace(ranks(), ["a", "b"]), tmp_path / name, begin, end)
    assert list(tmp_path.iterdir()) == []


def test_a_stretch_with_too_many_spans_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAX_DRAWN", 10)
    with pytest.raises(InputError, match="has 160 spans, over 10"):
        plot_trace(chrome_trace(ranks(), ["a", "b"]), tmp_path / "x.svg", 0.0, 1.0)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"{}", b'{"traceEvents": 3}', b"[" * 100_000, b'{"traceEvents":[{"ph":"X"}]}'],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"give (a file|one) that --trace wrote"):
        plot_trace(path, tmp_path / "x.svg", 0.0, 1.0)


def test_the_command_draws_and_refuses_in_one_line(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", ranks(), ["layer 0 attn", "layer 0 mlp"])
    command = [sys.executable, "-m", "bench.studies.draw_trace", str(tmp_path / "trace.json")]
    result = run_command([*command, str(tmp_path / "x.png"), "--from", "0", "--to", "0.1"], env={}, cwd=ROOT)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert png_size(tmp_path / "x.png")[0] == 1650
    result = run_command([*command, str(tmp_path / "x.png"), "--from", "5", "--to", "6"], env={}, cwd=ROOT)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(InputError, match="is a folder"):
        check_plot(str(tmp_path))
