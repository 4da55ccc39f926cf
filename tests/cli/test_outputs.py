"""Output options write over nothing but earlier output of ours, and say before the work what cannot be written."""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.launch import Result
from tests.support.messages import assert_one_line
from tpimpi.diagnostics.bench.allreduce import Found
from tpimpi.serving.perplexity import Result as Perplexity
from tpimpi.serving.perplexity import Score
from tpimpi.serving.report import Report
from tpimpi.system.files import check_writable, write_json
from tpimpi.system.own_files import PICTURE, TRACE, is_picture, is_report, is_trace

ANSWER = ["--prompt", "fox", "--max-tokens", "2", "--quiet"]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A picture of one pixel (PNG specification, 5.3), with these chunks before the pixel."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    every = (header, *chunks, (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in every
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


FOREIGN = {
    "chat.jsonl": b'{"tpimpi session": 1, "model": "tiny", "fingerprint": "0", "vocabulary": 9, "options": {}}\n',
    "config.json": b'{\n  "model_type": "llama",\n  "hidden_size": 64\n}\n',
    "mine.json": b'{\n "model": "mine",\n "ranks": 1\n}\n',
    "nested.json": b'{\n "mine": {\n  "folder": "x",\n  "slices": []\n }\n}\n',
    "line.json": b'{"folder": "x", "slices": []}',
    "broken.json": b"{",
}


def test_nothing_but_an_earlier_report_is_written_over(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog")
    commands = (
        (["cache"], "--json"),
        (["inspect", str(tiny)], "--json"),
        (["perplexity", str(text), "--max-tokens", "8"], "--report"),
        (ANSWER, "--report"),
    )
    for number, (name, content) in enumerate(FOREIGN.items()):
        path = tmp_path / name
        path.write_bytes(content)
        for command, option in commands if number < 2 else commands[:1]:
            result = tpimpi(*command, option, str(path), env={"TPIMPI_MODEL": str(tiny)})
            assert_one_line(
                result, f"{option} .*{name} is there, and is no report of tpimpi; remove it, or choose another"
            )
            assert path.read_bytes() == content
    config = tiny / "config.json"
    before = config.read_bytes()
    assert_one_line(tpimpi(*ANSWER, "--model", str(tiny), "--report", str(config)), "is there, and is no report")
    assert config.read_bytes() == before


def test_what_we_wrote_is_written_over(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.touch()  # as mktemp leaves it
    for command in (["cache", "--json"], ["inspect", str(tiny), "--json"], [*ANSWER, "--report"], ["cache", "--json"]):
        assert tpimpi(*command, str(path), env={"TPIMPI_MODEL": str(tiny)}).code == 0
    assert set(json.loads(path.read_text())) == {"folder", "slices"}


def test_reports_are_known_by_their_keys(tmp_path: Path) -> None:
    score = Score("f32", 2.0, 0.1, 0.7, 0.1, 1.0, 9.0)
    perplexity = Perplexity("m", "numpy", "star", None, "text", 9, 9, True, False, 1, 8, score, None, None)
    reports = [
        asdict(Report("m", "f32", "numpy", "star", text='{\n "x": 1' + "y" * 100_000)),
        perplexity.as_json(),
        Found(["a"], "MPICH", [], {}).as_json(),
    ]
    for values in reports:
        write_json(tmp_path / "x.json", values)
        with (tmp_path / "x.json").open("rb") as file:
            assert is_report(file), values
        check_writable(str(tmp_path / "x.json"))


def test_traces_and_pictures_of_others_stay(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.png"
    trace.write_text('{"traceEvents":[\n{"ph":"X"}],"otherData":{"program":"another"}}\n')
    resolution = struct.pack(">IIB", 3937, 3937, 1)  # dots per metre: matplotlib's own 100 per inch
    picture.write_bytes(png((b"tEXt", b"Software\0Matplotlib version3.9"), (b"pHYs", resolution)))
    for option, path, kind in (("--trace", trace, "trace"), ("--plot", picture, "PNG picture")):
        before = path.read_bytes()
        result = tpimpi(*ANSWER, "--model", str(tiny), option, str(path))
        assert_one_line(result, f"{option} .* is there, and is no {kind} of tpimpi")
        assert path.read_bytes() == before
    resolution = struct.pack(">IIB", 5906, 5906, 1)  # 150 per inch, as earlier versions drew
    picture.write_bytes(png((b"tEXt", b"Software\0Matplotlib version3.9"), (b"pHYs", resolution)))
    check_writable(str(picture), "--plot", kind=PICTURE)
    both = ("--trace", str(tmp_path / "new.json"), "--plot", str(tmp_path / "new.png"))
    for _ in range(2):  # what the first run wrote the second writes over
        assert tpimpi(*ANSWER, "--model", str(tiny), *both).code == 0
    with (tmp_path / "new.json").open("rb") as file:
        assert is_trace(file)
    with (tmp_path / "new.png").open("rb") as file:
        assert is_picture(file)
    check_writable(str(tmp_path / "new.json"), "--trace", kind=TRACE)


def test_a_socket_and_a_pipe_that_nobody_reads_are_refused_before_the_work(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        os.mkfifo("pipe")
        for option in ("--report", "--trace", "--plot"):
            result = tpimpi(*ANSWER, "--model", str(tiny), option, "socket", cwd=tmp_path)
            assert_one_line(result, f"{option} socket is a socket; give the name of a file")
        for command in ([*ANSWER, "--model", str(tiny), "--report"], ["cache", "--json"]):
            result = tpimpi(*command, "pipe", cwd=tmp_path, timeout=20)
            assert_one_line(result, "pipe is a pipe that nobody reads; start what reads it, or give the name of a file")
