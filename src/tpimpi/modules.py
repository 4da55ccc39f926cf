"""Imports without what they do not need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar, cast

T = TypeVar("T")


class ModuleTable(Mapping[str, T]):
    """A table of what stands in a module each: imported when it is first asked for, as a run needs few of them."""

    def __init__(self, package: str, places: Mapping[str, str]) -> None:
        """By its key, where a value stands: "module.NAME", in `package`."""
        self._package, self._places = package, places
        self._imported: dict[str, T] = {}

    def __getitem__(self, key: str) -> T:
        value = self._imported.get(key)
        if value is None:
            module, name = self._places[key].split(".")
            value = self._imported[key] = getattr(importlib.import_module(f"{self._package}.{module}"), name)
        return value

    @property
    def modules(self) -> set[str]:
        """The names of all modules, imported or not."""
        return {f"{self._package}.{place.split('.')[0]}" for place in self._places.values()}

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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
