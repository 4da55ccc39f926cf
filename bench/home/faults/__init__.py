"""Things that break in a home cluster, tried over the emulated home: `python -m bench.home.faults`."""
