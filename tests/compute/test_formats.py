"""Weight formats against gguf, torch, and the layout as it is specified, byte by byte."""

from __future__ import annotations

import re
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.formats import EVERY_FORMAT
from tests.support.launch import ROOT
from tpimpi.compute.arrays import median
from tpimpi.compute.formats import FORMATS, WEIGHT_FORMATS, is_quantized, nearest_format
from tpimpi.compute.formats.bf16 import from_bf16, to_bf16
from tpimpi.compute.formats.packed import (
    Matrix,
    decode,
    encode,
    holds_infinities,
    pack,
    packed_bytes,
    panel_bytes,
    row_bytes,
    runs_of_rows,
    unpack,
    values,
)

QUANTIZED = ["q8_0", "q4_0", "q4_1"]  # of the others: test_block_formats.py
KINDS = {fmt: gguf.GGMLQuantizationType[fmt.upper()] for fmt in WEIGHT_FORMATS if is_quantized(fmt)}
shapes = {
    "fmt": st.sampled_from(["f32", "bf16", *QUANTIZED]),
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 200),
}


def test_the_formats_are_known_to_the_kernels_by_the_same_numbers() -> None:
    enum = re.search(r"enum class Format \{([^}]*)\}", (ROOT / "src/kernels/kernels.h").read_text(encoding="utf-8"))
    assert enum is not None
    assert [name.strip() for name in enum[1].split(",")] == sorted(FORMATS, key=lambda name: FORMATS[name].kernel_code)
    assert sorted(form.kernel_code for form in FORMATS.values()) == list(range(len(FORMATS)))


@pytest.mark.parametrize("fmt", KINDS)
def test_blocks_are_as_large_as_ggmls(fmt: str) -> None:
    assert (FORMATS[fmt].block_weights, FORMATS[fmt].block_bytes) == gguf.GGML_QUANT_SIZES[KINDS[fmt]]


def test_the_format_that_other_types_become() -> None:
    """Its own where there is one; else one of no fewer bits, and 8 bits where nobody knows."""
    assert {fmt: nearest_format(fmt) for fmt in WEIGHT_FORMATS} == {fmt: fmt for fmt in WEIGHT_FORMATS}
    sizes = {kind.name.lower(): size / weights for kind, (weights, size) in gguf.GGML_QUANT_SIZES.items()}
    for stored in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0"):
        assert nearest_format(stored) != "q8_0"
        assert FORMATS[nearest_format(stored)].weight_bytes >= sizes[stored], stored
    assert nearest_format("nvfp4") == "q6_k"
    assert nearest_format("f64") == "q8_0"


def random_rows(fmt: str, rows: int, columns: int) -> np.ndarray:
    """Any bytes at all, in row form."""
    return np.random.default_rng(rows * 1000 + columns).integers(0, 256, (rows, row_bytes(fmt, columns)), np.uint8)


def packed_as_specified(stored: np.ndarray, fmt: str, columns: int) -> bytes:
    """The packed form, a word at a time."""
    rows = stored.shape[0]
    out = b""
    for first in range(0, rows, 16):
        panel = [stored[row].tobytes() if row < rows else None for row in range(first, first + 16)]

        def line(start: int, size: int = 4, flip: int = 0, panel: list[bytes | None] = panel) -> bytes:
            words = [b"" if row is None else bytes(byte ^ flip for byte in row[start : start + size]) for row in panel]
            return b"".join(word.ljust(size, b"\0") for word in words)

        if fmt in ("f32", "bf16"):
            out += b"".join(line(start) for start in range(0, stored.shape[1], 4))
            continue
        numbers, codes = {"q8_0": (1, 32), "q4_0": (1, 16), "q4_1": (2, 16)}[fmt]
        size = 2 * numbers + codes
        blocks = -(-columns // 32)
        for block in range(0, blocks, 2):
            pair = range(block, min(block + 2, blocks))
            for number in range(numbers):
                out += b"".join(line(b * size + 2 * number, 2) for b in pair).ljust(64, b"\0")
            for b in pair:
                flip = 128 if fmt == "q8_0" else 0
                out += b"".join(line(b * size + 2 * numbers + 4 * j, 4, flip) for j in range(codes // 4))
    return out


@examples(120)
@given(**shapes)
def test_packing_is_as_specified_and_loses_nothing(fmt: str, rows: int, columns: int) -> None:
    stored = random_rows(fmt, rows, columns)
    matrix = pack(stored, fmt, columns)
    assert (matrix.format, matrix.rows, matrix.columns) == (fmt, rows, columns)
    assert matrix.data.tobytes() == packed_as_specified(stored, fmt, columns)
    assert matrix.data.nbytes == packed_bytes(fmt, rows, columns) == -(-rows // 16) * panel_bytes(fmt, columns)
    assert matrix.data.ctypes.data % 64 == panel_bytes(fmt, columns) % 64 == 0
    np.testing.assert_array_equal(unpack(matrix), stored)


@pytest.mark.parametrize("fmt", ["f32", "bf16", *QUANTIZED])
def test_packing_takes_rows_of_a_larger_array(fmt: str) -> None:
    """Slicing hands in columns of a run of rows."""
    stored = random_rows(fmt, 300, 640)
    part = stored[:, row_bytes(fmt, 64) : row_bytes(fmt, 64 + 96)]
    assert pack(part, fmt, 96).data.tobytes() == pack(part.copy(), fmt, 96).data.tobytes()


@examples(60)
@given(**shapes, numbers=st.integers(1, 4000))
def test_runs_of_rows_are_the_matrix(fmt: str, rows: int, columns: int, numbers: int) -> None:
    matrix = pack(random_rows(fmt, rows, columns), fmt, columns)
    runs = list(runs_of_rows(matrix, numbers))
    assert [first for first, _ in runs] == list(np.cumsum([0, *(run.rows for _, run in runs)])[:-1])
    np.testing.assert_array_equal(np.concatenate([unpack(run) for _, run in runs]), unpack(matrix))
    assert all(run.rows * columns <= max(numbers, 16 * columns) for _, run in runs)
    assert all(np.shares_memory(run.data, matrix.data) for _, run in runs)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 64), (33, 96), (2, 4096)])
def test_blocks_have_ggufs_numbers(fmt: str, rows: int, columns: int) -> None:
    stored = random_rows(fmt, rows, columns)
    size = row_bytes(fmt, 32)
    for start in (1, 3) if fmt == "q4_1" else (1,):
        stored[:, start::size] &= 0x7B  # no scale that is infinite
    assert stored.shape == gguf.quants.quant_shape_to_byte_shape((rows, columns), KINDS[fmt])
    expected = gguf.quants.dequantize(stored, KINDS[fmt])
    np.testing.assert_array_equal(decode(stored, fmt, columns), expected)
    np.testing.assert_array_equal(values(pack(stored, fmt, columns)), expected)
    np.testing.assert_array_equal(decode(stored, fmt, columns - 5), expected[:, :-5])


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("columns", [1, 31, 33, 100])
def test_a_last_block_is_filled_up_with_zeros(fmt: str, columns: int) -> None:
    numbers = np.random.default_rng(1).standard_normal((7, columns), dtype=np.float32)
    padded = np.zeros((7, -(-columns // 32) * 32), np.float32)
    padded[:, :columns] = numbers
    stored = encode(numbers, fmt)
    assert stored.shape == (7, row_bytes(fmt, columns))
    np.testing.assert_array_equal(stored, encode(padded, fmt))
    assert np.abs(decode(stored, fmt, columns) - numbers).max() < 0.3


@pytest.mark.parametrize("fmt", ["f32", "bf16"])
@pytest.mark.parametrize("columns", [1, 2, 33])
def test_plain_numbers(fmt: str, columns: int) -> None:
    numbers = np.random.default_rng(2).standard_normal((19, columns), dtype=np.float32)
    dtype = torch.float32 if fmt == "f32" else torch.bfloat16
    stored = encode(numbers, fmt)
    assert stored.tobytes() == torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy().tobytes()
    expected = torch.from_numpy(numbers).to(dtype).float().numpy()
    np.testing.assert_array_equal(decode(stored, fmt, columns), expected)
    np.testing.assert_array_equal(values(pack(stored, fmt, columns)), expected)


def test_bf16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    special = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001], np.uint32)
    numbers = np.concatenate([bits, special]).view(np.float32)
    for shape in ((-1,), (2, -1)):
        shaped = numbers.reshape(shape)
        expected = torch.from_numpy(shaped).to(torch.bfloat16)
        found = torch.from_numpy(to_bf16(shaped).view(np.int16)).view(torch.bfloat16)
        nan = torch.isnan(expected)
        assert torch.equal(torch.isnan(found), nan)
        assert torch.equal(found[~nan], expected[~nan])
        np.testing.assert_array_equal(from_bf16(to_bf16(shaped))[~nan.numpy()], expected[~nan].float().numpy())


@pytest.mark.parametrize("fmt", KINDS)
def test_a_scale_that_is_no_number_is_found(fmt: str) -> None:
    stored = encode(np.ones((3, 768), np.float32), fmt)
    assert not holds_infinities(stored, fmt)
    for place in FORMATS[fmt].f16_offsets:
        for bits in (0x7C00, 0xFC00, 0x7E01):
            broken = stored.copy()
            start = row_bytes(fmt, 512) + place
            broken[1, start : start + 2] = np.array([bits], "<u2").view(np.uint8)
            assert holds_infinities(broken, fmt)


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
@pytest.mark.slow_but("q8_0", "q4_k")
def test_converting_needs_little_beside_its_result(fmt: str) -> None:
    quick = fmt in ("f32", "bf16", "f16", *QUANTIZED)  # the others are quantized with NumPy: few rows show it too
    numbers = np.random.default_rng(3).standard_normal((4096 if quick else 256, 2048), dtype=np.float32)
    stored = encode(numbers, fmt)
    matrix: Matrix = pack(stored, fmt, 2048)
    results = [
        (lambda: encode(numbers, fmt), 0 if fmt == "f32" else stored.nbytes),
        (lambda: pack(stored, fmt, 2048), matrix.data.nbytes),
        (lambda: unpack(matrix), stored.nbytes),
        (lambda: decode(stored, fmt, 2048), 0 if fmt == "f32" else numbers.nbytes),
    ]
    for convert, size in results:
        tracemalloc.start()
        convert()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < size + 8e6


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_decoded_rows_can_be_sent_whatever_their_width(fmt: str) -> None:
    """MPI sends contiguous memory only: also of rows that do not fill their last block."""
    found = decode(encode(np.ones((3, 70), np.float32), fmt), fmt, 70)
    assert found.shape == (3, 70) and found.flags.c_contiguous


@pytest.mark.parametrize(("fmt", "most"), [("q8_0", 65504 * 127), ("q4_0", 65504 * 8), ("q4_1", 65504)])
def test_numbers_that_a_format_does_not_have_are_refused(fmt: str, most: float) -> None:
    values = np.zeros((2, 64), np.float32)
    values[1, 40] = -most
    assert np.abs(decode(encode(values, fmt), fmt, 64)[1, 40]) == pytest.approx(most, rel=0.01)
    values[1, 40] = 1.01 * most
    with pytest.raises(ValueError, match=f"{fmt} nothing over"):
        encode(values, fmt)


@pytest.mark.parametrize(
    "values", [[3.0], [2.0, 1.0], [5.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 9.0, 0.5, 2.25]]
)
def test_the_median_is_numpys(values: list[float]) -> None:
    assert median(values) == np.median(values)
