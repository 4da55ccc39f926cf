"""Which files are ours and may be written over: earlier reports, traces and pictures. Whatever else is there, stays."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

# Keys that the JSON of a command has had since there is that command, at the top; one set for each.
REPORTS = (
    {"model", "format", "backend", "allreduce", "load_s", "token_ids", "prompt_tokens", "ranks"},  # a run
    {"model", "format", "backend", "perplexity", "nll", "tokens_scored", "ranks"},  # perplexity
    {"path", "verified", "model", "slices", "problem"},  # inspect
    {"folder", "slices"},  # cache
    {"model", "formats", "context", "plans", "advice"},  # plan
    {"tpimpi", "ranks", "links", "findings"},  # doctor
    {"tpimpi", "python", "mpi", "hosts"},  # doctor --hostfile
    {"threads", "shape", "multiply_peak", "rows"},  # bench kernels
    {"size", "readers", "regions", "rows", "best"},  # bench disk
    {"hosts", "library", "latencies", "rules", "rows"},  # bench allreduce
)
TRACE_BEGINNING = b'{"traceEvents":'  # of every trace that is written here
PNG = b"\x89PNG\r\n\x1a\n"
SOFTWARE = "tpimpi"  # named in our pictures
DOTS_PER_INCH = 150  # of our pictures

_TOP_KEY = re.compile(rb' "([a-z_]+)": ')  # a line of our JSON, whose indentation is one blank
_MAX_LINE_BYTES = 1 << 16
_TRACE_PROGRAM = b'"program":"tpimpi"'
_TAIL_BYTES = 1 << 16  # of a trace: what it says of itself is at its end
_HEAD_BYTES = 4096  # of a picture: the program and the resolution are before the pixels
# Pictures of earlier versions name matplotlib, and have our resolution, in dots per metre.
_EARLIER_PICTURE = (b"Software\x00Matplotlib", b"pHYs" + round(DOTS_PER_INCH / 0.0254).to_bytes(4) * 2)


@dataclass(frozen=True)
class Kind:
    """A kind of output file; `is_ours` says of an open file that is not empty whether it was written by a run of ours."""

    name: str
    is_ours: Callable[[BinaryIO], bool]


def is_report(file: BinaryIO) -> bool:
    """Whether a file is JSON that a command of ours has written: by its keys at the top, a line each."""
    if file.readline(_MAX_LINE_BYTES) != b"{\n":
        return False
    keys = {match[1].decode() for line in _lines(file) if (match := _TOP_KEY.match(line))}
    return any(keys >= wanted for wanted in REPORTS)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The beginnings of lines: of a line that is longer, the rest is left out."""
    whole = True
    while line := file.readline(_MAX_LINE_BYTES):
        if whole:
            yield line
        whole = line.endswith(b"\n")


def is_trace(file: BinaryIO) -> bool:
    """Whether a file is a trace of ours."""
    if file.read(len(TRACE_BEGINNING)) != TRACE_BEGINNING:
        return False
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    return _TRACE_PROGRAM in file.read()


def is_routing(file: BinaryIO) -> bool:
    """Whether a file is a trace of routing: an .npy file of uint16."""
    head = file.read(_HEAD_BYTES)
    return head.startswith(b"\x93NUMPY") and b"'descr': '<u2'" in head


def is_picture(file: BinaryIO) -> bool:
    """Whether a file is a picture of ours."""
    head = file.read(_HEAD_BYTES)
    ours = f"Software\0{SOFTWARE}".encode()
    return head.startswith(PNG) and (ours in head or all(mark in head for mark in _EARLIER_PICTURE))


REPORT = Kind("report", is_report)
TRACE = Kind("trace", is_trace)
ROUTING = Kind("trace of routing", is_routing)
PICTURE = Kind("PNG picture", is_picture)
