"""`python -m tpimpi` without a launcher, forked from a process that has imported its modules: a tenth of a start's time.

The results are those of a process of its own; what is about such a process (how it starts, what it has imported, how much
memory it took) is tested with `run_command`.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import TIMEOUT, Result
from tests.support.worker import open_stream, program

# What a run and most commands import; none of them starts MPI.
MODULES = ("tpimpi.cli.run", "tpimpi.cli.slicing", "tpimpi.compute.backends.native", "tpimpi.weights.build")
# Read by Python and by the loader when a process starts: a run with one of them needs a process of its own.
START_VARIABLES = ("PYTHON", "LD_", "MALLOC_", "OMP_")

_CONTEXT = multiprocessing.get_context("forkserver")


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether a run with these variables is the same in a forked process."""
    return not any(name.startswith(START_VARIABLES) for name in env)


def start() -> None:
    """Start the process that others are forked from."""
    _CONTEXT.set_forkserver_preload(list(MODULES))
    forkserver.ensure_running()


def run_forked(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: str | None = None,
    cwd: Path | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """As `run_command` of `python -m tpimpi ARGUMENTS`."""
    with tempfile.TemporaryDirectory(prefix="tpimpi-fork-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        reading, writing = os.pipe() if stdin is not None else (os.open(os.devnull, os.O_RDONLY), -1)
        request = {"arguments": list(arguments), "env": {**os.environ, **env}, "cwd": cwd, "out": out, "err": err}
        process = _CONTEXT.Process(target=_child, args=(request, _Descriptor(reading)))
        process.start()
        os.close(reading)
        writer = threading.Thread(target=_write, args=(writing, stdin), daemon=True)
        writer.start()
        process.join(timeout)
        ended = process.exitcode is not None
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        writer.join()
        result = Result(process.exitcode or 0, *(path.read_text(errors="replace") for path in (out, err)))
        process.close()
    if not ended:
        pytest.fail(f"{' '.join(arguments)} took over {timeout:.0f} s\nstdout: {result.out}\nstderr: {result.err}")
    return result


class _Descriptor:
    """A file descriptor that goes along to the child."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self.number),)


def _detach(handle: Any) -> int:
    return int(handle.detach())


def _write(descriptor: int, text: str | None) -> None:
    if text is None:
        return
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "w") as pipe:
        pipe.write(text)


def _child(request: dict[str, Any], stdin: int) -> None:
    """In the forked process: run with its own streams, variables and folder, and leave with the exit code."""
    os.setsid()
    os.dup2(stdin, 0)
    os.close(stdin)
    for number, path in ((1, request["out"]), (2, request["err"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (open_stream(number) for number in range(3))
    os.environ.clear()
    os.environ.update(request["env"])
    if request["cwd"]:
        os.chdir(request["cwd"])
    code = program(["-m", "tpimpi", *request["arguments"]])
    atexit._run_exitfuncs()
    for opened_stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            opened_stream.flush()
    os._exit(code)
