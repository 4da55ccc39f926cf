"""Traces: what the Trace Event Format asks for, one clock for all ranks, and what is bad, large or too much.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
import json
import threading
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import PROGRAMS
from tests.support.ranks import Ranks
from tpimpi.cli.run_options import parse_run
from tpimpi.diagnostics.trace_file import chrome_trace, left_out, write_trace
from tpimpi.engine.trace import COMPUTE, KINDS, READ, STAR, WAIT, PassSpan, RankTrace, Recorder, TraceNote, unpack
from tpimpi.errors import InputError, StarError, StorageError
from tpimpi.serving.report import Report
from tpimpi.star import Star
from tpimpi.star.control import decode_note, to_json
from tpimpi.system.files import write_json

BLOCKS = ["layer 0 attn", "layer 0 mlp", "head"]
HOSTILE = 'pi"},{"ph":"X"</script>\n\x1b[31m\u202e\ud800 $x_{1}$ ' + "y" * 300


def recorded(*spans: tuple[int, int, int, float, float, int], most: int = 100) -> Recorder:
    recorder = Recorder(most)
    for kind, block, tile, began, ended, lane in spans:
        recorder.add(kind, block, tile, began, ended, lane)
    return recorder


def two_ranks() -> list[RankTrace]:
    """Rank 1's clock is 500 s behind the hub's; its first read begins 2 ms before anything that the hub does."""
    hub = recorded(
        (READ, 0, 0, 1000.002, 1000.004, 0),
        (COMPUTE, 0, 0, 1000.004, 1000.0055, 0),
        (STAR, 0, -1, 1000.0055, 1000.006, 0),
    )
    hub.add_pass(PassSpan(1000.002, 1000.0045, 7, 2))
    hub.add_pass(PassSpan(1000.0045, 1000.006, 5, drafted=4, accepted=2, tokens=3))
    other = recorded(
        (READ, 1, 7, 500.0, 500.001, 0), (READ, 1, 8, 500.0005, 500.002, 1), (WAIT, 1, 7, 500.0, 500.001, 0)
    )
    return [
        RankTrace(0, "desk", 0.0, hub.pack(), [[1000.003, 200e6, 120e6, 30.5e6]], passes=hub.passes),
        RankTrace(1, "pi", 500.0, other.pack(), [[500.001, 90e6, 0, 10e6], [500.002, 91e6, 0, 10e6]]),
    ]


def events(trace: dict, phase: str, **fields: object) -> list[dict]:
    found = [event for event in trace["traceEvents"] if event["ph"] == phase]
    return [event for event in found if all(event[name] == value for name, value in fields.items())]


def check_format(trace: dict) -> None:
    """What the specification demands of the JSON object form, and of each phase that is used."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and event["name"]
        assert type(event["pid"]) is int
        assert event["ph"] in ("X", "C", "M")
        if event["ph"] == "M":
            key = {"process_name": "name", "thread_name": "name", "process_labels": "labels"}.get(
                event["name"], "sort_index"
            )
            assert list(event["args"]) == [key]
            assert type(event["args"][key]) is (int if key == "sort_index" else str)
            continue
        assert type(event["ts"]) is int and event["ts"] >= 0
        if event["ph"] == "X":
            assert type(event["tid"]) is int and type(event["dur"]) is int and event["dur"] >= 0
            assert event["cat"] in (*KINDS, "pass")
            assert event["cat"] == "pass" or set(event["args"]) <= {"tile"}
        else:
            assert event["args"] and all(type(value) in (int, float) for value in event["args"].values())


# The format


def test_events_are_as_the_format_wants_them() -> None:
    trace = chrome_trace(two_ranks(), BLOCKS)
    check_format(trace)
    assert min(event["ts"] for event in trace["traceEvents"] if "ts" in event) == 0
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events(trace, "M", name="thread_name")}
    assert sorted(names.values()) == ["compute", "disk wait", "passes", "read 0", "read 0", "read 1", "star"]
    assert len(names) == 7, "two lanes share a thread"
    assert {e["pid"]: e["args"]["name"] for e in events(trace, "M", name="process_name")} == {0: "r0 desk", 1: "r1 pi"}
    spans = [(names[e["pid"], e["tid"]], e["pid"], e["name"], e["args"], e["ts"], e["dur"]) for e in events(trace, "X")]
    assert spans == [
        ("read 0", 0, "layer 0 attn", {"tile": 0}, 2000, 2000),
        ("compute", 0, "layer 0 attn", {"tile": 0}, 4000, 1500),
        ("star", 0, "layer 0 attn", {}, 5500, 500),
        ("passes", 0, "prompt", {"rows": 7, "sequences": 2, "drafted": 0, "accepted": 0, "tokens": 0}, 2000, 2500),
        ("passes", 0, "pass", {"rows": 5, "sequences": 1, "drafted": 4, "accepted": 2, "tokens": 3}, 4500, 1500),
        ("read 0", 1, "layer 0 mlp", {"tile": 7}, 0, 1000),
        ("read 1", 1, "layer 0 mlp", {"tile": 8}, 500, 1500),
        ("disk wait", 1, "layer 0 mlp", {"tile": 7}, 0, 1000),
    ]


def test_memory_is_counters_on_the_same_clock() -> None:
    trace = chrome_trace(two_ranks(), BLOCKS)
    counters = [(e["pid"], e["name"], e["ts"], e["args"]) for e in events(trace, "C")]
    assert counters[:4] == [
        (0, "resident", 3000, {"MB": 200.0}),
        (0, "pinned", 3000, {"MB": 120.0}),
        (0, "buffers", 3000, {"MB": 30.5}),
        (1, "resident", 1000, {"MB": 90.0}),
    ]
    assert len(counters) == 9


def test_spans_that_touch_never_overlap_by_rounding() -> None:
    """Viewers drop a span that overlaps the one before it in its thread without lying in it."""
    rng = np.random.default_rng(3)
    ends = np.cumsum(rng.random(5000) * 3e-6) + 54_321.987
    spans = [(COMPUTE, 0, 0, float(a), float(b), 0) for a, b in itertools.pairwise(ends)]
    trace = chrome_trace([RankTrace(0, "h", 0.123456789, recorded(*spans, most=5000).pack(), [])], BLOCKS)
    made = events(trace, "X")
    assert all(a["ts"] + a["dur"] == b["ts"] for a, b in itertools.pairwise(made))
    assert sum(event["dur"] for event in made) == pytest.approx((ends[-1] - ends[0]) * 1e6, abs=1)


def test_a_span_outside_every_block_bears_the_name_of_its_kind() -> None:
    trace = chrome_trace([RankTrace(0, "h", 0.0, recorded((STAR, -1, -1, 1.0, 2.0, 0)).pack(), [])], [])
    assert [event["name"] for event in events(trace, "X")] == ["star"]


def test_what_is_written_is_the_object(tmp_path: Path) -> None:
    ranks = two_ranks()
    path = tmp_path / "trace.json"
    write_trace(path, ranks, BLOCKS)
    text = path.read_text(encoding="ascii")
    assert json.loads(text) == chrome_trace(ranks, BLOCKS)
    assert len(text.splitlines()) == len(chrome_trace(ranks, BLOCKS)["traceEvents"]) + 2
    write_trace(path, [RankTrace(0, "h", 0.0, b"", [])], [])  # over the earlier one
    assert events(json.loads(path.read_text()), "X") == []
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_hostile_host_names_stay_names(tmp_path: Path) -> None:
    ranks = [RankTrace(0, HOSTILE, 0.0, recorded((READ, 0, 0, 1.0, 2.0, 0)).pack(), [])]
    write_trace(tmp_path / "trace.json", ranks, BLOCKS)
    trace = json.loads((tmp_path / "trace.json").read_bytes())
    check_format(trace)
    assert [event["args"]["name"] for event in events(trace, "M", name="process_name")] == [f"r0 {HOSTILE}"]
    assert len(events(trace, "X")) == 1


# Recording


def test_what_is_added_is_what_is_unpacked() -> None:
    recorder = recorded((READ, 2, 5, 1.25, 2.5, 3), (STAR, 0, -1, 1e6, 1e6 + 1e-6, 0))
    assert unpack(recorder.pack()).tolist() == [(0, 3, 2, 5, 1.25, 2.5), (3, 0, 0, -1, 1e6, 1e6 + 1e-6)]
    assert len(recorder.pack()) == 2 * 26
    assert Recorder().max_bytes == 5_200_000
    assert unpack(Recorder(0).pack()).size == 0


def test_spans_beyond_the_most_are_counted_and_said() -> None:
    recorder = recorded(*[(COMPUTE, 0, index, float(index), index + 1.0, 0) for index in range(7)], most=5)
    assert recorder.dropped == 2
    assert unpack(recorder.pack())["tile"].tolist() == [0, 1, 2, 3, 4]
    ranks = [RankTrace(0, "a", 0.0, recorder.pack(), []), RankTrace(1, "b", 0.0, recorder.pack(), [], recorder.dropped)]
    trace = chrome_trace(ranks, BLOCKS)
    check_format(trace)
    assert trace["otherData"]["dropped"] == {"r1": 2}
    assert [(e["pid"], e["args"]["labels"]) for e in events(trace, "M", name="process_labels")] == [
        (1, "2 later spans left out")
    ]
    assert "2 of r1 b" in (left_out(ranks) or "")
    assert left_out(ranks[:1]) is None


def test_threads_may_add_at_the_same_time() -> None:
    recorder = Recorder(15_000)

    def add(lane: int) -> None:
        for tile in range(5000):
            recorder.add(READ, lane, tile, tile + lane / 8, tile + lane / 8 + 1, lane)

    threads = [threading.Thread(target=add, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = unpack(recorder.pack())
    assert (spans.size, recorder.dropped) == (15_000, 5000)
    assert (spans["block"] == spans["lane"]).all()
    assert (spans["began"] == spans["tile"] + spans["lane"] / 8).all()
    for lane in range(4):  # each thread's own stay in order, none twice
        assert (np.diff(spans["tile"][spans["lane"] == lane]) >= 1).all()


def test_a_note_brings_everything_but_the_offset() -> None:
    rank = RankTrace(2, HOSTILE, 0.0, recorded((READ, 0, 0, 1.0, 2.0, 0)).pack(), [[1.0, 2, 3, 4]], 9)
    note = decode_note(to_json(rank.note()), TraceNote, "r2")
    assert RankTrace.from_note(2, note, 4.5) == RankTrace(2, HOSTILE, 4.5, rank.spans, [[1.0, 2, 3, 4]], 9)


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"host":"h","timeline":[],"dropped":0,"spans":"*"}',
        b'{"host":"h","timeline":[],"dropped":0,"spans":5}',
        b'{"host":"h","timeline":3,"dropped":0,"spans":""}',
        b'{"host":"h","timeline":[["x"]],"dropped":0,"spans":""}',
        b'{"host":"h","timeline":[],"dropped":Infinity,"spans":""}',
    ],
)
def test_a_note_that_makes_no_sense_is_refused(note: bytes) -> None:
    with pytest.raises(StarError, match="r3 pi sent a note that makes no sense"):
        decode_note(note, TraceNote, "r3 pi")


@pytest.mark.parametrize(
    ("span", "what"),
    [
        ((4, 0, 0, 1.0, 2.0, 0), "kind 4, must be from 0 to 3"),
        ((READ, 3, 0, 1.0, 2.0, 0), "block 3, must be from -1 to 2"),
        ((READ, -2, 0, 1.0, 2.0, 0), "block -2"),
        ((READ, 0, -2, 1.0, 2.0, 0), "tile -2"),
        ((READ, 0, 0, 2.0, 1.0, 0), "ends before it begins"),
        ((READ, 0, 0, float("nan"), 1.0, 0), "at no time"),
        ((READ, 0, 0, 1.0, float("inf"), 0), "at no time"),
        ((READ, 0, 0, 1.0, 1e300, 0), "at no time"),
    ],
)
def test_spans_that_make_no_sense_are_refused(tmp_path: Path, span: tuple, what: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text("as it was")
    with pytest.raises(StarError, match=f"r1 pi recorded .*{what}"):
        write_trace(path, [*two_ranks()[:1], RankTrace(1, "pi", 0.0, recorded(span).pack(), [])], BLOCKS)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("trace.json", "as it was")]


@pytest.mark.parametrize("point", [[1.0, 2, 3], [1.0, 2, 3, 4, 5], [1.0, float("nan"), 3, 4], [float("inf"), 2, 3, 4]])
def test_timelines_that_make_no_sense_are_refused(point: list[float]) -> None:
    with pytest.raises(StarError, match="r0 h sent a timeline that is not"):
        chrome_trace([RankTrace(0, "h", 0.0, b"", [point])], BLOCKS)
    with pytest.raises(StarError, match="27 bytes of spans"):
        chrome_trace([RankTrace(0, "h", 0.0, bytes(27), [])], BLOCKS)


# Large ones, and files


@pytest.mark.slow
def test_a_large_trace_is_written_in_little_memory(tmp_path: Path) -> None:
    """80,000 spans are 60 MB as Python objects, and 9 MB of text."""
    count = 20_000
    recorder = Recorder(count)
    for index in range(count):
        recorder.add(index % 4, index % 3, index, index * 1e-3, index * 1e-3 + 5e-4, index % 5)
    ranks = [RankTrace(rank, "h", 0.0, recorder.pack(), []) for rank in range(4)]
    tracemalloc.start()
    try:
        write_trace(tmp_path / "trace.json", ranks, BLOCKS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6e6, f"{peak / 1e6:.1f} MB"
    assert len(events(json.loads((tmp_path / "trace.json").read_bytes()), "X")) == 4 * count


@pytest.mark.parametrize("target", ["/nowhere/trace.json", "/dev/full"])
def test_a_trace_that_cannot_be_written_is_a_storage_error(target: str) -> None:
    with pytest.raises(StorageError, match=f"cannot write {target}: .*choose another --trace"):
        write_trace(Path(target), two_ranks(), BLOCKS)


def test_a_link_stays_a_link_and_a_device_is_written_as_it_is(tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    write_trace(link, two_ranks(), BLOCKS)
    assert link.is_symlink() and json.loads(target.read_bytes())
    write_trace(Path("/dev/null"), two_ranks(), BLOCKS)
    assert not Path("/dev/null").is_file()


def checked(*arguments: str) -> None:
    parse_run(arguments)


def test_targets_are_refused_before_the_work(tmp_path: Path) -> None:
    prompt, report, notes = tmp_path / "prompt.txt", tmp_path / "report.json", tmp_path / "notes.txt"
    prompt.write_text('{"traceEvents":[')
    write_json(report, asdict(Report("x", "f32", "numpy", "star")))
    notes.write_text("mine")
    for target, what in [
        ("", "--trace is empty"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "none" / "t.json"), "there is no folder"),
        (str(notes), "is there, and is no trace"),
        (str(report), "is there, and is no trace"),
        (str(prompt), "is a file that this run reads"),
    ]:
        with pytest.raises(InputError, match=what):
            checked("--prompt-file", str(prompt), "--trace", target)
    with pytest.raises(InputError, match=r"--report and --trace are both .*x\.json; give each a file of its own"):
        checked("--report", str(tmp_path / "x.json"), "--trace", str(tmp_path / "." / "x.json"))
    assert notes.read_text() == "mine"
    old = tmp_path / "old.json"
    write_trace(old, two_ranks(), BLOCKS)
    checked("--prompt-file", str(prompt), "--trace", str(old), "--report", str(report))
    checked("--report", "/dev/null", "--trace", "/dev/null")


# One clock


def test_clocks_are_compared(on_ranks: Ranks) -> None:
    """On one host, offsets within 5 ms, those of clocks that are planted wrong too."""
    result = on_ranks(3, str(PROGRAMS / "star_clock.py"))
    assert result.code == 0, result.err
    assert "all well" in result.out


def test_a_single_rank_has_one_clock() -> None:
    assert Star(None).clock_offsets() == [0.0]
