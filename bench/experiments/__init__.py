"""The experiments of docs/measurements.md: `python -m bench.experiments`."""
