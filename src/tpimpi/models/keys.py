"""Typed look-ups in a model's own description: config.json, GGUF metadata, the header of a slice.

Whoever wrote them may be wrong or hostile: every value is checked, and a refusal is a ModelError of one line that names the
file, the key, the value found and the value needed.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tpimpi.errors import ModelError

# Far above any real model, and low enough that no list made from a hostile config fills the memory.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096

Word = TypeVar("Word", bound=str)


class Keys:
    """Typed look-ups in a dictionary that somebody else wrote."""

    def __init__(self, values: Mapping[str, Any], path: Path | str, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def integer(self, key: str, default: int | None = None, high: int = MAX_SIZE) -> int:
        """A positive whole number; a missing key is refused when there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ModelError(
                f"{self.path}: {self.prefix}{key} is {show(value)}; a whole number of 1 to {high} is needed"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number; a missing key is refused when there is no default."""
        value = self._get(key, default)
        if not is_positive(value):
            raise ModelError(f"{self.path}: {self.prefix}{key} is {show(value)}; a positive number is needed")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A truth value; if missing the default, and false if null."""
        value = self.values.get(self.prefix + key, default)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.path}: {self.prefix}{key} is {show(value)}; true or false is needed")
        return bool(value)

    def choice(self, key: str, known: Sequence[Word]) -> Word:
        """One of some words; a missing key is refused."""
        value = self._get(key, None)
        for word in known:
            if value == word:
                return word
        raise ModelError(f"{self.path}: {self.prefix}{key} is {show(value)}; one of {', '.join(known)} is needed")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key, default)
        if value is None and self.prefix + key not in self.values:
            raise ModelError(f"{self.path}: key '{self.prefix}{key}' is missing, without which the model is not known")
        return value


def words(text: str) -> frozenset[str]:
    """The words of a text, such as a list of keys."""
    return frozenset(text.split())


def even_split(hidden: int, heads: int, path: Path | str, names: tuple[str, str, str]) -> int:
    """hidden / heads, the size of a head. ModelError that names the three keys where it is no whole number."""
    if hidden % heads:
        raise ModelError(
            f"{path}: {names[0]} is {hidden}, no multiple of {names[1]}, which is {heads}, and there is no {names[2]}; "
            f"one of the three is wrong"
        )
    return hidden // heads


def is_off(value: Any) -> bool:
    """Whether a key with this value is as good as missing: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})


def is_positive(value: Any) -> bool:
    """Whether this is a positive, finite number that a float can hold (JSON's integers may be larger)."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < math.inf
    except OverflowError:
        return False


_SHORT = reprlib.Repr()  # bounded in length and depth, whatever stands in the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80  # characters


def show(value: Any) -> str:
    """A value from a file as it may stand in a one-line message."""
    return _SHORT.repr(value)
