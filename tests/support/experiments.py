"""Experiments run as commands, and results that are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.experiments import results as results_of
from tests.support.launch import ROOT, TIMEOUT


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.experiments", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, check=False
    )


def result(row: Any, **figures: Any) -> dict[str, Any]:
    """A line as `run` keeps it."""
    return {
        "settings": row.settings(),
        "figures": figures,
        "command": "",
        "took_s": 1.0,
        "when": "2026-01-01T00:00Z",
        "commit": results_of.commit(),
        "machine": results_of.machine(),
        "versions": {},
    }
