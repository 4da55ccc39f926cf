"""The cache of keys and values: what is written is read, in f32 to the bit and in f16 rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tpimpi.models.kv.cache import KVCache, kv_dtype, to_f16


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reads_what_was_written_of_each_head_layer_and_position(dtype: type[np.floating]) -> None:
    random = np.random.default_rng(5)
    cache = KVCache(layers=2, kv_heads=3, context=7, head_dim=4, dtype=dtype)
    k, v = random.standard_normal((2, 5, 3, 4), dtype=np.float32)  # [positions, heads, head_dim]
    cache.write(1, 0, 0, k[:4, :1], v[:4, :1])  # a tile with the first head, then one with the others
    cache.write(1, 1, 0, k[:4, 1:], v[:4, 1:])
    cache.write(1, 0, 4, k[4:], v[4:])  # and the next position
    keys, values = cache.read(1, 5)
    for found, written in ((keys, k), (values, v)):
        assert found.dtype == dtype and found.shape == (3, 5, 4)
        expected = torch.from_numpy(written).to(torch.float16 if dtype == np.float16 else torch.float32).numpy()
        np.testing.assert_array_equal(found, expected.transpose(1, 0, 2))
        assert found.base is not None, "a copy, not a view"
    assert not cache.read(0, 5)[0].any(), "another layer was written to"


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


def test_an_f16_cache_takes_half_the_memory() -> None:
    whole, half = (KVCache(1, 2, 8, 4, dtype) for dtype in (np.float32, np.float16))
    assert 2 * half.k.nbytes == whole.k.nbytes == 2 * 8 * 4 * 4


@pytest.mark.parametrize(
    ("kv", "formats", "dtype"),
    [
        ("auto", ["f32", "f32"], np.float32),
        ("auto", ["bf16"], np.float16),
        ("auto", ["f32", "q4_0"], np.float16),
        ("f32", ["q4_0"], np.float32),
        ("f16", ["f32"], np.float16),
    ],
)
def test_the_format_that_kv_means(kv: str, formats: list[str], dtype: type[np.floating]) -> None:
    assert kv_dtype(kv, formats) == dtype


@pytest.mark.parametrize("context", [9, 4000])
def test_a_cache_takes_over_what_another_holds(context: int) -> None:
    random = np.random.default_rng(6)
    old, new = KVCache(3, 2, 1000, 5, np.float16), KVCache(3, 2, context, 5, np.float16)
    k, v = random.standard_normal((2, 3, 1000, 2, 5)).astype(np.float32)
    for layer in range(3):
        old.write(layer, 0, 0, k[layer], v[layer])
    new.take_over(old, 7)
    assert new.filled == 7
    for layer in range(3):
        for found, written in zip(new.read(layer, 9), (k, v), strict=True):
            np.testing.assert_array_equal(found[:, :7], written[layer, :7].transpose(1, 0, 2).astype(np.float16))
            assert not found[:, 7:].any()
