"""Types of the extension; see src/kernels/binding.cpp."""

from typing import Any

import numpy as np
import numpy.typing as npt

_F32 = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]

def levels() -> list[str]: ...
def pack(format: int, stored: _Bytes, columns: int, first: int, out: _Bytes) -> None: ...

class LinkCipher:
    def __init__(self, name: str, key: bytes, opens: bool) -> None: ...
    def seal(self, tag: int, number: int, data: _Bytes, frame: _Bytes, /) -> None: ...
    def open(self, tag: int, number: int, frame: _Bytes, into: _Bytes, /) -> bool: ...

class Session:
    def __init__(self, level: str, threads: int) -> None: ...
    @property
    def level(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def linear(
        self, format: int, rows: int, columns: int, data: _Bytes, x: _F32, bias: _F32 | None, y: _F32, first: int = 0
    ) -> None: ...
    def rms_norm(self, x: _F32, weight: _F32, eps: float, y: _F32) -> None: ...
    def fixed_rms_norm(self, x: _F32, weight: _F32, eps: float, y: _F32) -> None: ...
    def rope(self, x: _F32, cos: _F32, sin: _F32, y: _F32) -> None: ...
    def swiglu(self, gate: _F32, up: _F32, y: _F32) -> None: ...
    def geglu(self, gate: _F32, up: _F32, y: _F32) -> None: ...
    def clamped_swiglu(self, gate: _F32, up: _F32, limit: float, y: _F32) -> None: ...
    def route(
        self,
        x: _F32,
        router: npt.NDArray[np.uint16] | _F32,
        bias: _F32 | None,
        bias_of: int,
        sigmoid: bool,
        normalized: bool,
        scale: float,
        experts: npt.NDArray[np.int32],
        weights: _F32,
    ) -> bool: ...
    def experts(self, x: _F32, uses: list[tuple[Any, ...]], activation: int, limit: float, out: _F32) -> None: ...
    def attention(
        self,
        q: _F32,
        k: npt.NDArray[Any],
        v: npt.NDArray[Any],
        sequence: npt.NDArray[np.int32],
        position: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
        q_to_kv: tuple[int, ...],
        window: int,
        scale: float,
        softcap: float,
        sinks: _F32 | None,
        y: _F32,
    ) -> None: ...
    def store(
        self,
        k: _F32,
        v: _F32,
        k_pages: npt.NDArray[Any],
        v_pages: npt.NDArray[Any],
        sequence: npt.NDArray[np.int32],
        position: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
        first_head: int,
    ) -> None: ...
    def quantize(self, format: int, values: _F32, out: _Bytes) -> bool: ...
    def read(self, data: _Bytes) -> int: ...
    def multiply_peak(self, format: int, seconds: float) -> float: ...
