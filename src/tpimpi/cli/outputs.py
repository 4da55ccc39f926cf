"""The files that a run writes: each can be written, and none takes the place of another that is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tpimpi.cli.options import OutputOptions
from tpimpi.errors import InputError
from tpimpi.serving.batch_file import PART
from tpimpi.serving.kept_cache import SUFFIX as KEPT
from tpimpi.system.files import check_writable
from tpimpi.system.own_files import ROUTING, TRACE


def check_outputs(
    output: OutputOptions, read: Sequence[str | None], session: str | None = None, answers: str | None = None
) -> None:
    """Raise InputError where a file that is to be written cannot be, or would replace another that this run uses: one that
    is `read`, the `session`, or the `answers` of a batch."""
    inputs = [path for path in read if path]
    if output.report is not None:
        check_writable(output.report, inputs=inputs)
    if output.trace is not None:
        check_writable(output.trace, "--trace", inputs, TRACE)
    if output.record_routing is not None:
        check_writable(output.record_routing, "--record-routing", inputs, ROUTING)
    if output.plot is not None:
        from tpimpi.diagnostics.plots import check_plot  # which most runs do without

        check_plot(output.plot, "--plot", inputs)
    batch = {"--out": answers, "what --out is until it is whole": None if answers is None else answers + PART}
    written = {
        "--session": session,
        "what --keep-cache keeps beside --session": None if session is None else session + KEPT,
        **batch,
        "--report": output.report,
        "--trace": output.trace,
        "--plot": output.plot,
        "--record-routing": output.record_routing,
    }
    read_files = set(map(os.path.realpath, inputs))
    for option, given in batch.items():
        if given is not None and os.path.realpath(given) in read_files:
            raise InputError(f"{option}, {given}, is a file that this run reads; choose another name")
    taken: dict[Path, str] = {}
    for option, given in written.items():
        if given is None or (os.path.exists(given) and not os.path.isfile(given)):  # noqa: PTH110, PTH113
            continue  # a device takes anything
        other = taken.setdefault(Path(os.path.realpath(given)), option)  # never raises, as resolve() does
        if other != option:
            raise InputError(f"{other} and {option} are both {given}; give each a file of its own")
