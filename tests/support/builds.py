"""Where CMake builds: folders that are kept, so that a test compiles only what has changed since."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.launch import ROOT


def extension_builds() -> list[Path]:
    """That of the extension for this Python (pyproject.toml, build-dir), as pip left it; none where it never built here."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return sorted(path.parent for path in (ROOT / "build").glob(f"{python}-{python}-*/build.ninja"))
