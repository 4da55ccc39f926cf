"""Matrices of mxfp4 that a Hugging Face folder holds as two tensors of bytes, NAME_blocks and NAME_scales, as gpt-oss has.

Blocks [..., rows, columns / 32, 16]: the low half of byte i is the code of weight 2 i of a block, the high half that of
weight 2 i + 1. Scales [..., rows, columns / 32]: the exponents (transformers.integrations.mxfp4). Codes and exponents are
those of GGML's mxfp4, whose bytes have weights i and i + 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tpimpi.compute.arrays import Bytes
from tpimpi.compute.formats.mxfp4 import MXFP4
from tpimpi.errors import ModelError
from tpimpi.models.tensors import Piece
from tpimpi.weights.sources.stored import Stored, TensorInfo
from tpimpi.weights.sources.weight_file import shown

BYTES_DTYPE = "u8"  # what safetensors calls them, in small letters
_BLOCKS, _SCALES = "_blocks", "_scales"
_CODE_BYTES = MXFP4.block_bytes - 1


@dataclass(frozen=True, kw_only=True)
class _Pair(Stored):
    """The codes lie where a Stored lies, the exponents in another tensor."""

    scales: Stored

    def flat(self) -> Stored:
        return replace(super().flat(), scales=self.scales.flat())  # type: ignore[call-arg]

    def cut(self, piece: Piece) -> Stored:
        return replace(super().cut(piece), scales=self.scales.cut(piece))  # type: ignore[call-arg]

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows [start, stop) as GGML has them. Peak memory: twice the result."""
        codes, exponents = super().rows(start, stop), self.scales.rows(start, stop)
        codes = codes.reshape(*exponents.shape, _CODE_BYTES)
        low, high = np.split(codes, 2, axis=-1)
        out = np.empty((*exponents.shape, MXFP4.block_bytes), np.uint8)
        out[..., 0] = exponents
        out[..., 1::2] = (low & 15) | (high << 4)
        out[..., 2::2] = (low >> 4) | (high & 0xF0)
        return out.reshape(len(exponents), -1)


def join_pairs(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with each pair as one, by the name without an ending. ModelError for one without the other."""
    joined = {name: tensor for name, tensor in found.items() if tensor.info.format != BYTES_DTYPE}
    for name, tensor in found.items():
        if tensor.info.format != BYTES_DTYPE or (name.endswith(_SCALES) and _other(name) in found):
            continue
        scales = found.get(_other(name))
        if not name.endswith(_BLOCKS) or scales is None or scales.info.format != BYTES_DTYPE:
            raise ModelError(
                f"{tensor.file.path}: tensor {shown(name)} holds bytes, and {shown(_other(name))} is missing or does not; "
                f"both are needed, download the model again"
            )
        shape = tensor.info.shape
        if shape != (*scales.info.shape, _CODE_BYTES) or len(shape) < 3:
            raise ModelError(
                f"{tensor.file.path}: tensor {shown(name)} has shape {list(shape)}, and {shown(_other(name))} "
                f"{list(scales.info.shape)}; the first needs {_CODE_BYTES} bytes for each of the second"
            )
        whole = name.removesuffix(_BLOCKS)
        info = TensorInfo(whole, (*shape[:-2], shape[-2] * MXFP4.block_weights), MXFP4.name)
        joined[whole] = _Pair(
            info=info, file=tensor.file, offset=tensor.offset, row_bytes=tensor.row_bytes, scales=scales
        )
    return joined


def _other(name: str) -> str:
    if name.endswith(_BLOCKS):
        return name.removesuffix(_BLOCKS) + _SCALES
    return name.removesuffix(_SCALES) + _BLOCKS
