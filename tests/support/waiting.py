"""Waiting in tests for what other threads do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until `what` is so; fails where it is not in time."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)
