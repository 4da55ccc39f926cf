"""The cache of keys and values: its formats, what is stored in its pages is read, and memory that comes and goes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from tpimpi.compute.backends.reference import NumpyBackend
from tpimpi.compute.kv import to_f16, to_q8_0, widened
from tpimpi.errors import InputError
from tpimpi.models.kv.cache import FULL, KINDS, PAGE, WINDOWED, KVCache, KVShape, StepRows, resolve_kv_format

TWIN = NumpyBackend(1)


@pytest.mark.parametrize("fmt", ["f32", "f16", "q8_0"])
def test_reads_what_was_written_of_each_head_layer_and_position(fmt: str) -> None:
    random = np.random.default_rng(5)
    cache = KVCache(KVShape((FULL, WINDOWED, FULL), 3, 32, fmt), [4, 3])
    tables = (np.array([[2, 0], [3, 1]], np.int32), np.array([[1, -1], [0, 2]], np.int32))
    position = np.array([0, 1, 63, 5, 64], np.int32)
    rows = StepRows(np.array([0, 0, 0, 1, 1], np.int32), position, tables)
    k, v = random.standard_normal((2, 5, 3, 32), dtype=np.float32)  # [rows, heads, head_dim]
    for layer, kind in ((1, WINDOWED), (2, FULL)):
        TWIN.store(cache.layer_pages(layer), rows.for_kind(kind), 0, k[:, :1], v[:, :1])  # a tile with the first head
        TWIN.store(cache.layer_pages(layer), rows.for_kind(kind), 1, k[:, 1:], v[:, 1:])  # and one with the others
        places = tables[kind][rows.sequence, position // PAGE]
        for pages, written in ((cache.layer_pages(layer).k, k), (cache.layer_pages(layer).v, v)):
            found = widened(pages[places, :, position % PAGE])
            np.testing.assert_allclose(found, written, rtol={"f32": 0, "f16": 1e-3, "q8_0": 0}[fmt], atol=0.02)
            left = pages.copy()
            left[places, :, position % PAGE] = 0
            assert not left.any(), "another place was written to"
    assert not cache.layer_pages(0).k.any() and not cache.layer_pages(0).v.any(), "another layer was written to"


def test_memory_is_taken_and_given_back_page_by_page() -> None:
    """A shape of several pages of memory a page, of which only those that were written count."""
    shape = KVShape((FULL, WINDOWED, WINDOWED), 2, 64, "f16")
    assert [shape.page_bytes(kind) for kind in KINDS] == [2 * 2 * 64 * 64 * 2, 2 * 2 * 2 * 64 * 64 * 2]
    assert shape.nbytes(PAGE + 1) == 2 * 3 * 2 * 2 * 64 * 64 * 2
    cache = KVCache(shape, [4, 4])
    rows = StepRows.of_sequence(PAGE - 1, 2, [np.array([3, 1, -1], np.int32)] * 2)
    one = np.ones((2, 2, 64), np.float32)
    for layer, kind in enumerate(shape.kinds):
        TWIN.store(cache.layer_pages(layer), rows.for_kind(kind), 0, one, one)
    cache.note_written(rows)
    assert cache.filled_bytes == shape.nbytes(2 * PAGE)
    cache.release(WINDOWED, [3])
    assert cache.filled_bytes == shape.nbytes(2 * PAGE) - shape.page_bytes(WINDOWED)
    assert not cache.layer_pages(1).k[3].any() and cache.layer_pages(1).k[1].any() and cache.layer_pages(0).k[3].any()
    larger = KVCache(shape, [9, 9])
    larger.take_over(cache, [[(3, 3), (1, 0)], [(1, 7)]])
    assert (
        not cache.filled_bytes
        and larger.layer_pages(2).v[7].any()
        and larger.layer_pages(0).k[3].any()
        and larger.layer_pages(0).k[0].any()
    )
    assert larger.filled_bytes == 2 * shape.page_bytes(FULL) + shape.page_bytes(WINDOWED)
    assert KVShape(shape.kinds, 2, 64, "f16", 3).nbytes(9 * PAGE) == shape.nbytes_of([9, 3])


@pytest.mark.parametrize(
    ("number", "stored"),
    [
        (1 + 2**-11, 1.0),  # halfway between 1 and the next: to the even one
        (1 + 3 * 2**-11, 1 + 2**-9),
        (2**-24, 2**-24),  # the smallest
        (2**-26, 0.0),
        (65504, 65504),
        (65519, 65504),
        (65520, 65504),  # would be rounded to infinity
        (-1e30, -65504),
        (np.inf, 65504),
        (-np.inf, -65504),
        (np.nan, np.nan),
    ],
)
def test_f16_is_rounded_and_never_infinite(number: float, stored: float) -> None:
    np.testing.assert_array_equal(to_f16(np.array([number], np.float32)), np.array([stored], np.float16))


def test_q8_0_is_what_the_gguf_package_writes_and_reads() -> None:
    """Its codes are of the scale before that is rounded to f16, so a few are the next ones; ours are the nearest."""
    x = np.random.default_rng(3).standard_normal((40, 96), dtype=np.float32)
    x *= np.logspace(-1, 4, 40, dtype=np.float32)[:, None]
    x[3, 32:64] = 0
    ours, theirs = to_q8_0(x), gguf_quantize(x, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(widened(ours), dequantize(ours, GGMLQuantizationType.Q8_0))
    blocks, others = (of.reshape(-1, 34) for of in (ours, theirs))
    np.testing.assert_array_equal(blocks[:, :2], others[:, :2])
    off = np.abs(blocks[:, 2:].view(np.int8).astype(int) - others[:, 2:].view(np.int8))
    assert off.max() <= 1 and off.mean() < 0.05
    # Half a step; and where the scale was rounded down the greatest number is beyond 127 steps.
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    assert (np.abs(widened(ours) - x).reshape(-1, 32) <= scale * np.float32(0.54)).all()


def test_q8_0_of_what_is_no_number_is_finite_or_lost() -> None:
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 5], x[2, 40] = np.inf, -3e38, np.nan
    found = widened(to_q8_0(x))
    assert found[0, 5] == 65504 * 127 == -found[1, 5]
    assert np.isnan(found[2, 32:]).all() and np.allclose(found[2, :32], 1, rtol=1e-3) and np.isfinite(found[:2]).all()


@pytest.mark.parametrize(("fmt", "page"), [("f32", 3), ("f16", 1)])
def test_a_longer_cache_takes_over_pages(fmt: str, page: int) -> None:
    random = np.random.default_rng(6)
    shape = KVShape((FULL, FULL), 3, 4, fmt)
    short, long = KVCache(shape, [4, 4]), KVCache(shape, [6, 6])
    for layer in range(2):
        for of in (short.layer_pages(layer).k, short.layer_pages(layer).v):
            of[:] = random.standard_normal(of.shape)
    before = [
        of.copy() for layer in range(2) for of in (short.layer_pages(layer).k[:page], short.layer_pages(layer).v[:page])
    ]
    long.take_over(short, [[(number, number) for number in range(page)]] * 2)
    after = [of[:page] for layer in range(2) for of in (long.layer_pages(layer).k, long.layer_pages(layer).v)]
    for found, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not long.layer_pages(0).k[page:].any() and short.layer_pages(0).k[page:].any()


def test_a_page_of_f16_takes_half_the_memory_and_one_of_q8_0_half_of_that() -> None:
    whole, half, quarter = (KVShape((FULL,) * 32, 2, 128, fmt).page_bytes(FULL) for fmt in ("f32", "f16", "q8_0"))
    assert whole == 2 * half == 32 * 2 * 2 * PAGE * 128 * 4
    assert quarter == half * 34 // 64


@pytest.mark.parametrize(
    ("kv", "formats", "fmt"),
    [
        ("auto", ["f32", "f32"], "f32"),
        ("auto", ["bf16"], "f16"),
        ("auto", ["f32", "q4_0"], "f16"),
        ("f32", ["q4_0"], "f32"),
        ("f16", ["f32"], "f16"),
        ("q8_0", ["f32"], "q8_0"),
    ],
)
def test_the_format_that_kv_means(kv: str, formats: list[str], fmt: str) -> None:
    assert resolve_kv_format(kv, formats, 64) == fmt


def test_heads_that_have_no_whole_blocks_are_refused() -> None:
    assert resolve_kv_format("auto", ["f32"], 80) == "f32"
    with pytest.raises(InputError, match="numbers by 32, and this model's heads have 80; give --kv f16"):
        resolve_kv_format("q8_0", ["f32"], 80)
