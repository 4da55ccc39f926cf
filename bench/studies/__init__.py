"""Measurements that docs/ cites, each with a command of its own: `python -m bench.studies.NAME`."""
