# PYTHON_ARGCOMPLETE_OK
"""`python -m tpimpi`, and the command `tpimpi`."""

import contextlib
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run what the arguments name, and leave with its exit code. A shell that completes words asks here too."""
    try:
        if "_ARGCOMPLETE" in os.environ:
            from tpimpi.cli.completion import complete

            complete()
        from tpimpi.cli.main import main as run
    except ImportError as error:
        from tpimpi.errors import as_ours

        print(f"tpimpi: {as_ours(error)}", file=sys.stderr, flush=True)
        # A rank that leaves before it has joined the others can leave the launcher waiting; join, and end them all.
        with contextlib.suppress(Exception):
            from tpimpi.star import connect

            connect().abort(1)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
