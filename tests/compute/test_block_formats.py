"""Formats of blocks against the gguf package, bit for bit, and cuts of columns within blocks of 256."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tpimpi.compute.formats import FORMATS, WEIGHT_FORMATS, is_quantized, nearest_format
from tpimpi.compute.formats.packed import decode, encode, pack, packed_bytes, row_bytes, unpack, values

QUANTIZED = [fmt for fmt in WEIGHT_FORMATS if is_quantized(fmt)]
LARGE = [fmt for fmt in QUANTIZED if FORMATS[fmt].block_weights == 256]
# Lines of 64 bytes of 16 rows of 256 columns: 16 bytes a line are one row's words.
LINES = {
    "q8_0": 68,
    "q6_k": 53,
    "q5_k": 44,
    "q4_k": 36,
    "q3_k": 28,
    "q2_k": 21,
    "iq4_xs": 34,
    "mxfp4": 34,
    "iq4_nl": 36,
}


def ggufs(stored: np.ndarray, fmt: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[fmt.upper()])


def hostile_rows(fmt: str, columns: int) -> np.ndarray:
    """Rows of any bytes, of zeros, of all ones, and any bytes with scales (and minima) that are hostile."""
    form = FORMATS[fmt]
    random = np.random.default_rng(columns)
    rows = random.integers(0, 256, (12, row_bytes(fmt, columns)), np.uint8)
    rows[0], rows[1] = 0, 255
    special = np.array([0, -0.0, 65504, -65504, 2**-24, -(2**-14), np.nan, np.inf, -np.inf, 1], "<f2")
    for number, place in enumerate(form.f16_offsets):
        blocks = rows[2:].reshape(10, -1, form.block_bytes)
        blocks[:, :, place : place + 2] = np.roll(special, number)[:, None, None].view(np.uint8)
    return rows


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_every_weight_is_the_f32_that_gguf_gives(fmt: str) -> None:
    """Also NaN and infinities, and after packing: what a slice of a GGUF file holds is the file's numbers."""
    for columns in (256, 768):
        stored = hostile_rows(fmt, columns)
        expected = ggufs(stored, fmt)
        np.testing.assert_array_equal(decode(stored, fmt, columns), expected)
        matrix = pack(stored, fmt, columns)
        np.testing.assert_array_equal(unpack(matrix), stored)
        np.testing.assert_array_equal(values(matrix), expected)


@examples(60)
@given(fmt=st.sampled_from(QUANTIZED), start=st.integers(0, 30), units=st.integers(1, 20), rows=st.integers(1, 33))
def test_a_cut_of_columns_has_their_numbers(fmt: str, start: int, units: int, rows: int) -> None:
    form, columns = FORMATS[fmt], 1536
    units = min(units, columns // 32 - start)
    begin, size = 32 * start, 32 * units
    stored = np.random.default_rng(start).integers(0, 256, (rows, row_bytes(fmt, columns)), np.uint8)
    first = form.first_column(begin)
    assert first == begin % form.block_weights
    cut = stored[:, form.row_bytes(begin - first) :][:, : form.row_bytes(size, first)]
    matrix = pack(cut, fmt, size, first)
    assert matrix.data.nbytes == packed_bytes(fmt, rows, size, first)
    np.testing.assert_array_equal(values(matrix), ggufs(stored, fmt)[:, begin : begin + size])


@pytest.mark.parametrize("fmt", LINES)
def test_a_panel_has_so_many_lines(fmt: str) -> None:
    assert packed_bytes(fmt, 16, 1024) == 4 * 64 * LINES[fmt]


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_packed_rows_are_hardly_larger_than_the_files(fmt: str) -> None:
    """At most 3 % in whole rows, and in quarters of 2048 columns that end within blocks."""
    assert packed_bytes(fmt, 64, 2048) <= 1.03 * 64 * row_bytes(fmt, 2048)
    form, cuts = FORMATS[fmt], [0, 2080, 4128, 6240, 8192]
    parts = [packed_bytes(fmt, 64, b - a, form.first_column(a)) for a, b in itertools.pairwise(cuts)]
    assert sum(parts) <= 1.03 * 64 * row_bytes(fmt, 8192)


@pytest.mark.parametrize("fmt", LARGE)
def test_a_cut_that_is_no_multiple_of_32_has_blocks_of_its_own(fmt: str) -> None:
    assert [FORMATS[fmt].first_column(start) for start in (0, 32, 80, 256, 480)] == [0, 32, 0, 0, 224]


# What gguf makes in another format, and how much of its squared error there may be.
AGAINST = {
    "q4_k": ("q4_0", 0.75),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), ("q4_0", 0.8)),
    "q5_k": ("q5_0", 0.75),
    "q6_k": ("q5_0", 0.25),
    "q3_k": ("q4_0", 3.5),
    "q2_k": ("q4_0", 12),
}


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_numbers_that_are_quantized_come_back(fmt: str) -> None:
    numbers = (np.random.default_rng(7).standard_normal((16, 1024)) * 0.02).astype(np.float32)
    numbers[3] = 0
    found = ggufs(encode(numbers, fmt), fmt)
    other, ratio = AGAINST.get(fmt, (fmt, 1))
    theirs = ggufs(gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[other.upper()]), other)
    assert np.square(found - numbers).sum() <= ratio * np.square(theirs - numbers).sum()
    assert np.abs(found[3]).max() < 1e-37


@pytest.mark.parametrize("stored", ["tq1_0", "tq2_0"])
def test_ternary_weights_become_q2_k_without_loss(stored: str) -> None:
    numbers = np.random.default_rng(1).integers(-1, 2, (8, 512)).astype(np.float32) * np.float32(0.0625)
    blocks = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[stored.upper()])
    assert nearest_format(stored) == "q2_k"
    np.testing.assert_array_equal(decode(encode(ggufs(blocks, stored), "q2_k"), "q2_k", 512), numbers)
