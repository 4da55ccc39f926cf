"""`python -m bench.experiments`: see command.py."""

import sys

from bench.experiments.command import main

if __name__ == "__main__":
    sys.exit(main())
