"""`python -m tpimpi`."""

import sys

if __name__ == "__main__":
    try:
        from tpimpi.cli import main
    except ImportError as error:
        from tpimpi.errors import as_ours

        print(f"tpimpi: {as_ours(error)}", file=sys.stderr)
        sys.exit(1)
    main()
