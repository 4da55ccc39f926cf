"""`python -m tpimpi`."""

import contextlib
import sys

if __name__ == "__main__":
    try:
        from tpimpi.cli.main import main
    except ImportError as error:
        from tpimpi.errors import as_ours

        print(f"tpimpi: {as_ours(error)}", file=sys.stderr, flush=True)
        # A rank that leaves before it has joined the others can leave the launcher waiting; join, and end them all.
        with contextlib.suppress(Exception):
            from tpimpi.star import connect

            connect().abort(1)
        sys.exit(1)
    main()
