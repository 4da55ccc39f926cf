"""A rank that stays up: runs one Python program after another, as `python ARGUMENTS` would, for tests/support/ranks.py.

Argument: the Unix socket of the test process, which says what to run. Between two programs a rank waits there, not in MPI,
so that it takes no processor time.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil


def main() -> None:
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
    with Client(sys.argv[1], "AF_UNIX") as connection:
        connection.send((rank, os.getpid()))
        with contextlib.suppress(EOFError):
            while True:
                connection.send(_run(connection.recv()))
    os._exit(0)  # without MPI_Finalize, which could wait for what a program left unfinished


def _run(request: dict[str, Any]) -> int:
    """Run one program with its own arguments, variables, folder and streams; its exit code."""
    environment, folder, argv, path = dict(os.environ), Path.cwd(), sys.argv, list(sys.path)
    streams = (sys.stdin, sys.stdout, sys.stderr)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, (name, flags) in enumerate(
        ((request["stdin"], os.O_RDONLY), *((request[stream], os.O_WRONLY | os.O_APPEND) for stream in ("out", "err")))
    ):
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (open_stream(number) for number in range(3))
    os.environ.update(request["env"])
    if request["cwd"]:
        os.chdir(request["cwd"])
    try:
        return program(request["arguments"])
    finally:
        _end_children()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.argv, sys.path[:] = argv, path
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)


def _end_children() -> None:
    """End what the program left behind: a refused run leaves a process that kills the launch if it is still there in ten
    seconds (star.heartbeat.end_without_mpi)."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=1)


def open_stream(number: int) -> io.TextIOWrapper:
    """Text on this file descriptor, as Python opens it at its start."""
    return io.TextIOWrapper(io.FileIO(number, "r" if number == 0 else "w", closefd=False), line_buffering=True)


def program(arguments: list[str]) -> int:
    """Run `python ARGUMENTS` here: its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # noqa: PTH100, PTH120
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
