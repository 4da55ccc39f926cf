"""tpimpi, with each matrix multiplication done several times over: a slower computer, for measuring what overlaps.

mpirun -np 2 … python -m bench.studies.slowed 3.5 --slices DIR …      3.5 times as much multiplying; options as of a run
"""

from __future__ import annotations

import sys
from typing import Any

from tpimpi.compute import backends


def repeat_linear(backend: Any, times: float) -> None:
    """Have `backend` do each `linear` so many times, on average where that is not whole; at least once."""
    linear, owed = backend.linear, 0.0

    def repeated(*arguments: Any, **named: Any) -> Any:
        nonlocal owed
        result = linear(*arguments, **named)
        owed += times - 1
        while owed >= 1:
            linear(*arguments, **named)
            owed -= 1
        return result

    backend.linear = repeated


def main() -> None:
    try:
        times = float(sys.argv[1])
    except (IndexError, ValueError):
        times = 0.0
    if not 1 <= times < float("inf"):
        sys.exit("slowed: the first argument is how many times to multiply, 1 or more, such as 3.5")
    load_backend = backends.load_backend

    def load_slowed(name: str, threads: int, kernels: str = "auto") -> Any:
        backend = load_backend(name, threads, kernels)
        repeat_linear(backend, times)
        return backend

    # Before tpimpi.cli.main is imported, and with it whatever takes the name from there.
    backends.load_backend = load_slowed
    from tpimpi.cli.main import main as run

    run(sys.argv[2:])


if __name__ == "__main__":
    main()
