"""Random weights in a model's shape, as a Source: what speed and memory are measured with where no model is at hand.

Every row of a matrix is cut out of one pool of random numbers, at a place that a hash of the seed, the tensor's name and
the row gives: so any rows can be had, in any order, at the speed of a copy. The numbers are about Gaussian, of standard
deviation 0.02; norms lie around 1, biases around 0. The same seed gives the same bytes on every machine: sums of
PCG64's bytes, and single IEEE operations.

All of them are bf16 numbers, whatever the format, so that a model can be written in bf16 too without changing one.
Blocks have the same scale d everywhere, a power of two (q4_1: minimum -8 d, so it holds the numbers of q4_0), which makes
them exact wherever they are cut. Of the other formats each has numbers of its own.

In a mixture of experts the norms before attention lie around 1/16. Random attention averages all positions, and with norms
around 1 that average soon outweighs the embedding, so that every token would choose the same experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.experts import RoutingTrace
from tpimpi.compute.formats import FORMATS, is_quantized
from tpimpi.compute.formats.bf16 import from_bf16, to_bf16
from tpimpi.compute.formats.blocks_of_32 import BLOCK_WEIGHTS
from tpimpi.compute.formats.packed import decode, encode, row_bytes
from tpimpi.errors import InputError
from tpimpi.models.config import ModelConfig
from tpimpi.models.shapes import Shape
from tpimpi.models.tensors import ModelTensor, model_tensors
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.system.given_file import open_file
from tpimpi.weights.sources import Source, TensorInfo

VERSION = 1  # of the numbers that a seed gives
SIGMA = 0.02
_PLACE_BITS = 18
_PLACES = 1 << _PLACE_BITS  # blocks of the pool at which a row can begin
_LONGEST_BLOCK = 256  # weights, of any format
_BYTES_PER_NUMBER = 12  # bytes that are added up for a number
_MEAN, _DEVIATION = _BYTES_PER_NUMBER * 255 // 2, 256  # of such sums
_SLAB_NUMBERS = 1 << 18  # numbers worked on at a time
_MIXTURE_ATTENTION_NORM = 1 / 16
_NORM_STEPS = 20  # a norm's weight is 1 + n / 128, n with a standard deviation of 256 / 20


def with_trace(shape: Shape, path: Path, predicted: float) -> tuple[Shape, RoutingTrace]:
    """The shape of a model that chooses its experts by the trace in a .npy file, and predicts this part of them.

    Such a trace is what another model chose: it has the locality of a real text, which a random router has not. Raises
    InputError: see read_trace.
    """
    trace = read_trace(shape.config, shape.name, path)
    made = replace(shape.config, trace_positions=len(trace), trace_predicted=predicted)
    return replace(shape, config=made), trace


def read_trace(config: ModelConfig, name: str, path: Path) -> RoutingTrace:
    """The trace of routing in a .npy file, for the model of this name. Raises InputError where the file is none, or is of
    another number of layers or experts."""
    try:
        with open_file("--routing", str(path), "give a trace of routing, .npy") as file:
            trace = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--routing {path} cannot be read as a .npy file: {error}") from error
    if trace.ndim != 3 or trace.dtype.kind not in "ui" or not len(trace):
        raise InputError(
            f"--routing {path} holds {trace.dtype} {list(trace.shape)}; whole numbers [positions, layers, chosen] are needed"
        )
    wanted = (config.layers, config.experts_per_token)
    if not config.experts or trace.shape[1:] != wanted:
        raise InputError(
            f"--routing {path} is of {trace.shape[1]} layers and {trace.shape[2]} experts a token, {name} has "
            f"{wanted[0]} and {wanted[1]}; make a trace for this shape"
        )
    if trace.min() < 0 or trace.max() >= config.experts or (np.diff(np.sort(trace, axis=2), axis=2) == 0).any():
        raise InputError(
            f"--routing {path} names experts from {trace.min()} to {trace.max()}, or one twice; a layer has {config.experts}"
        )
    return trace.astype(np.uint16)


class SyntheticSource(Source):
    """Random weights for a shape, each matrix in the format that `formats` gives it (see the module); no tokenizer.

    `path` is no file. Holds the pool: 17 MB, and 5 (q4_0) to 34 MB (f32) for
    each format that is read.
    """

    def __init__(self, shape: Shape, formats: ModelFormats, seed: int, trace: RoutingTrace | None = None) -> None:
        """`trace`: see `with_trace`."""
        name = f"{shape.name}-random"
        super().__init__(Path(f"{name}.synth"), shape.config, {}, [], dict, assets_in_header=True, name=name)
        self.shape, self.formats, self.seed = shape, formats, seed
        self._trace = b"" if trace is None else np.ascontiguousarray(trace, "<u2").tobytes()
        tensors = model_tensors(shape.config)
        infos = {name: TensorInfo(name, tensor.shape, self._format(tensor)) for name, tensor in tensors.items()}
        self._all = MappingProxyType(infos)
        self._weak_norms = {
            name for name, tensor in tensors.items() if shape.config.experts and tensor.part == "attn_norm"
        }
        self._pool = _Pool(seed, max(tensor.shape[-1] for tensor in tensors.values()))

    def _format(self, tensor: ModelTensor) -> str:
        if len(tensor.shape) == 1:
            return "f32"
        if tensor.part == "router":
            return self.formats.router
        return getattr(self.formats if tensor.layer < 0 else self.formats.layers[tensor.layer], tensor.part)

    def trace(self) -> bytes:
        """The experts to be chosen, uint16 [positions, layers, experts a token]."""
        return self._trace

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by its canonical name."""
        return self._all

    def read(self, name: str, rows: slice | None = None) -> F32:
        """Rows of a tensor as numbers: float32 [rows, in], or [rows] of a vector. KeyError for an unknown name."""
        info = self._all[name]
        numbers = decode(self.read_blocks(name, rows), info.format, info.shape[-1] if len(info.shape) > 1 else 1)
        return numbers if len(info.shape) > 1 else numbers.reshape(-1)

    def read_blocks(self, name: str, rows: slice | None = None) -> Bytes:
        """Rows of a tensor as they are stored: uint8 [rows, bytes a row]. `rows` is a slice of step 1."""
        start, stop, step = (rows or slice(None)).indices(self._all[name].shape[0])
        if step != 1:
            raise ValueError(f"rows of {name}: step is {step}, 1 is needed")
        return self.pick(name, np.arange(start, max(start, stop)))

    def pick(self, name: str, rows: npt.NDArray[np.intp], *, as_bf16: bool = False) -> Bytes:
        """These rows of a tensor, in this order, as they are stored, or as bf16: uint8 [rows, bytes a row]."""
        info = self._all[name]
        key = xxhash.xxh3_64_intdigest(f"{self.seed} {name}".encode())
        if len(info.shape) > 1:
            return self._pool.rows(info.format, _places(key, rows), info.shape[1], as_bf16=as_bf16)
        vector = self._pool.vector(int(_places(key, np.zeros(1, np.intp))[0]), info.shape[0], name)[rows]
        if name in self._weak_norms:
            vector *= np.float32(_MIXTURE_ATTENTION_NORM)
        stored: Array = to_bf16(vector) if as_bf16 else vector
        return np.ascontiguousarray(stored)[:, None].view(np.uint8)

    def fingerprint(self) -> str:
        """32 hex digits, other ones for other weights."""
        what = [VERSION, self.seed, self.formats.to_dict(), self.config.to_dict()]
        if self._weak_norms:
            what.append(_MIXTURE_ATTENTION_NORM)
        if self._trace:
            what.append(xxhash.xxh3_128_hexdigest(self._trace))
        return xxhash.xxh3_128_hexdigest(json.dumps(what, sort_keys=True).encode())


def quantize_exactly(values: F32, fmt: str) -> Bytes:
    """A Quantizer for numbers of a SyntheticSource: [rows, columns] in whole blocks, to blocks of the one scale."""
    form, scale = FORMATS[fmt], block_scale(fmt)
    blocks = values.reshape(values.shape[0], values.shape[1] // form.block_weights, form.block_weights)
    codes = np.rint(blocks / np.float32(scale))
    codes = np.clip(codes, *form.code_range()).astype(np.int8)
    return form.blocks_of_codes(codes, scale).reshape(values.shape[0], form.row_bytes(values.shape[1]))


def block_scale(fmt: str) -> float:
    """The scale of every block of a quantized format: a power of two with which codes reach to 2^-4, about 3 * SIGMA."""
    return 2.0**-4 / (FORMATS[fmt].code_range()[1] + 1)


class _Pool:
    """Random numbers, and the same in the forms that rows are cut from; `longest` is the longest row, in numbers."""

    def __init__(self, seed: int, longest: int) -> None:
        count = (_PLACES + -(-longest // _LONGEST_BLOCK) * _LONGEST_BLOCK // BLOCK_WEIGHTS) * BLOCK_WEIGHTS
        self._sums = np.empty(count, np.int16)  # of mean 0 and standard deviation 256
        bits = np.random.PCG64(xxhash.xxh3_64_intdigest(f"tpimpi {VERSION} {seed}".encode()))
        for start in range(0, count, _SLAB_NUMBERS):
            drawn = (
                bits.random_raw(_BYTES_PER_NUMBER * _SLAB_NUMBERS // 8)
                .astype("<u8")
                .view(np.uint8)
                .reshape(_BYTES_PER_NUMBER, _SLAB_NUMBERS)
            )
            total = drawn.sum(axis=0, dtype=np.int16)
            self._sums[start : start + _SLAB_NUMBERS] = total[: count - start] - np.int16(_MEAN)
        self._forms: dict[tuple[str, bool], Bytes] = {}

    def rows(self, fmt: str, places: npt.NDArray[np.intp], columns: int, *, as_bf16: bool) -> Bytes:
        """The rows that begin at these blocks: uint8 [rows, bytes a row]."""
        form = self._form(fmt, as_bf16)
        stored = "bf16" if as_bf16 else fmt
        block = max(FORMATS[fmt].block_weights, BLOCK_WEIGHTS)  # rows of blocks of 256 begin at every eighth place
        whole = -(-columns // block) * block if is_quantized(stored) else columns
        step, width = row_bytes(stored, block), row_bytes(stored, whole)
        every = block // BLOCK_WEIGHTS
        at_each_block = np.lib.stride_tricks.as_strided(form, (_PLACES // every, width), (step, 1), writeable=False)
        cut = at_each_block[places // every]
        if whole > columns:  # the last block ends with zeros
            cut = encode(decode(cut, fmt, columns), fmt, quantize_exactly)
        return cut

    def vector(self, place: int, size: int, name: str) -> F32:
        """A norm's or a bias's numbers, f32 [size]."""
        sums = self._sums[place * BLOCK_WEIGHTS :][:size].astype(np.float32)
        if name.endswith(("bias", "sinks")):
            return from_bf16(to_bf16(sums * np.float32(SIGMA / _DEVIATION)))
        return 1 + np.clip(np.rint(sums / np.float32(_NORM_STEPS)), -64, 64).astype(np.float32) / 128

    def _form(self, fmt: str, as_bf16: bool) -> Bytes:
        """The whole pool as one row of `fmt`, or of its numbers in bf16. Peak memory beside the result: a few MB."""
        key = (fmt, as_bf16)
        if key not in self._forms:
            pieces = []
            for start in range(0, self._sums.size, _SLAB_NUMBERS):
                sums = self._sums[start : start + _SLAB_NUMBERS].astype(np.float32)
                numbers = from_bf16(to_bf16(sums * np.float32(SIGMA / _DEVIATION)))[None]
                stored = encode(numbers, fmt, quantize_exactly)
                pieces.append(to_bf16(decode(stored, fmt, numbers.shape[1])).view(np.uint8) if as_bf16 else stored)
            self._forms[key] = np.concatenate(pieces, axis=1).reshape(-1)
        return self._forms[key]


def _places(key: int, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Where rows begin in the pool, in blocks: no two of the first 2^18 rows of a tensor at the same."""
    mask = _PLACES - 1
    mixed = rows.astype(np.int64) & mask
    for turn in range(3):  # each step can be undone, so no two rows ever fall together
        mixed = ((mixed ^ (key >> _PLACE_BITS * turn & mask)) * 0x9E3779B1) & mask
        mixed = mixed ^ (mixed >> _PLACE_BITS // 2)
    return mixed
