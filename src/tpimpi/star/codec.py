"""Numbers on the wire: f32 as they are, or packed as bf16 or q8_0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.backends import load_quantizer
from tpimpi.compute.formats.base import Quantizer
from tpimpi.compute.formats.packed import decode, encode
from tpimpi.compute.formats.quantize import quantize
from tpimpi.errors import StarError

WIRES = ("f32", "bf16", "q8_0")


@dataclass(frozen=True)
class Wire:
    """How numbers travel: `format` is one of WIRES."""

    format: str = "f32"
    quantizer: Quantizer = quantize

    def pack(self, values: F32) -> Bytes:
        """Numbers [n] as bytes [row_bytes]. f32 is not copied. StarError for numbers that the format does not have."""
        if self.format == "f32":
            return values.view(np.uint8)
        try:
            return encode(values.reshape(1, -1), self.format, self.quantizer).reshape(-1)
        except ValueError as error:
            raise StarError(f"a partial {error}, which --wire {self.format} cannot carry; use --wire f32") from error

    def unpack(self, data: Bytes, count: int) -> F32:
        """What `pack` made of `count` numbers: [count]. f32 is not copied."""
        if self.format == "f32":
            return data.view(np.float32)
        return decode(data.reshape(1, -1), self.format, count).reshape(-1)


def wire_of(fmt: str) -> Wire:
    """The wire that `--wire` names."""
    return Wire(fmt, load_quantizer(1)) if fmt == "q8_0" else Wire(fmt)
