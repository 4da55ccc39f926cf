"""Whole runs: the real model, faults, an emulated home, jobs, privacy, the installed wheel."""
