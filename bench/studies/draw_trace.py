"""Draw a stretch of a trace as an SVG or PNG.

    mpirun -np 2 --hostfile hostfiles/local.txt python -m tpimpi --prompt "Why?" --window 2 --trace trace.json
    python -m bench.studies.draw_trace trace.json trace.svg --from 1.5 --to 1.6

Seconds are those of the trace, as ui.perfetto.dev shows them. A stretch of one or two tokens reads well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tpimpi.diagnostics.plots import plot_trace
from tpimpi.errors import TpimpiError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="what --trace wrote")
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="its name ends in .svg or .png")
    parser.add_argument("--from", dest="begin", type=float, required=True, metavar="S", help="seconds of the trace")
    parser.add_argument("--to", dest="end", type=float, required=True, metavar="S")
    options = parser.parse_args()
    try:
        plot_trace(options.trace, options.picture, options.begin, options.end)
    except TpimpiError as error:
        print(f"draw_trace: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
