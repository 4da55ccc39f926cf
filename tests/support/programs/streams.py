"""Run on rank 0: lines on stdout and stderr in turn."""

from __future__ import annotations

import sys

from tpimpi.system.terminal import write_past_the_launcher

LINES = 300


def main() -> None:
    write_past_the_launcher()
    for number in range(LINES):
        print(f"out {number}", flush=True)
        print(f"err {number}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
