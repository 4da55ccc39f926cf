"""What a tile holds, as the functions of a layer need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tpimpi.compute.arrays import Array
from tpimpi.compute.formats.packed import Matrix


class Parts(Protocol):
    """What a tile holds, by name; shapes in weights/slices."""

    @property
    def parts(self) -> Mapping[str, Array]:
        """Biases."""

    @property
    def matrices(self) -> Mapping[str, Matrix]:
        """Weight matrices."""
