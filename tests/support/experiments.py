"""Experiments run as commands, and results that are made up."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT, TIMEOUT

sys.path.insert(0, str(ROOT / "bench"))
try:
    results_of = importlib.import_module("experiment_results")
finally:
    sys.path.remove(str(ROOT / "bench"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "experiments.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, check=False
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
