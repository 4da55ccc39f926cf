"""Imports without what they do not need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast


@contextmanager
def without_module(name: str) -> Iterator[None]:
    """What is imported inside finds no module of that name, unless it is imported already (None in sys.modules says so:
    the import system, "The module cache"), and does without it, if it can."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast(ModuleType, None)
    try:
        yield
    finally:
        del sys.modules[name]
