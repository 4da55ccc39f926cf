"""The quantizer against GGML's own (gguf.quants), against an exhaustive search, and against its statement in prose."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.support.drawn import examples
from tpimpi.compute.formats import q4_0, q8_0
from tpimpi.compute.formats.packed import decode
from tpimpi.compute.formats.q4_1 import CANDIDATE_PAIRS
from tpimpi.compute.formats.quantize import quantize

F = np.float32
FORMATS = ("q8_0", "q4_0", "q4_1")
KINDS = {fmt: gguf.GGMLQuantizationType[fmt.upper()] for fmt in FORMATS}
CANDIDATES = {"q8_0": q8_0.CANDIDATES, "q4_0": q4_0.CANDIDATES}
RANGES = {"q8_0": (-127, 127), "q4_0": (-8, 7), "q4_1": (0, 15)}


def drawn(kind: str, rows: int = 64, columns: int = 1024) -> np.ndarray:
    dice = np.random.default_rng(4)
    shape = (rows, columns)
    numbers = {
        "normal": lambda: dice.standard_normal(shape) * 0.02,
        "heavy tails": lambda: dice.standard_t(3, shape),
        "uniform": lambda: dice.uniform(-3, 5, shape),
        "far from zero": lambda: 1000 + dice.standard_normal(shape),
        "on a grid": lambda: dice.integers(-8, 8, shape) * 0.25,
        "tiny": lambda: dice.standard_normal(shape) * 3e-7,
    }[kind]()
    return numbers.astype(np.float32)


def block_errors(found: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return np.square(found.astype(np.float64) - numbers).reshape(-1, 32).sum(axis=1)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uniform", "far from zero", "on a grid", "tiny"])
def test_no_block_is_worse_than_ggmls(fmt: str, kind: str) -> None:
    numbers = drawn(kind)
    ours = block_errors(decode(quantize(numbers, fmt), fmt, numbers.shape[1]), numbers)
    blocks = gguf.quants.quantize(numbers, KINDS[fmt])
    theirs = block_errors(gguf.quants.dequantize(blocks, KINDS[fmt]), numbers)
    # The errors are compared in f32; far from zero that is coarse.
    slack = np.square(numbers.astype(np.float64)).reshape(-1, 32).sum(axis=1) * 1e-12
    assert (ours <= theirs * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize(("fmt", "ratio"), [("q8_0", 0.80), ("q4_0", 0.90), ("q4_1", 0.79)])
def test_the_error_on_normal_numbers_is_as_stated(fmt: str, ratio: float) -> None:
    numbers = drawn("normal", 256)
    ours = block_errors(decode(quantize(numbers, fmt), fmt, numbers.shape[1]), numbers).sum()
    theirs = gguf.quants.dequantize(gguf.quants.quantize(numbers, KINDS[fmt]), KINDS[fmt])
    assert ratio - 0.02 < ours / block_errors(theirs, numbers).sum() < ratio


@pytest.mark.parametrize(("fmt", "slack"), [("q8_0", 1.05), ("q4_0", 1.005)])
def test_little_is_left_to_an_exhaustive_search(fmt: str, slack: float) -> None:
    """All f16 scales within a factor of 1.6 of the plain choice, both signs."""
    numbers = drawn("normal", 4)
    low, high = RANGES[fmt]
    blocks = numbers.reshape(-1, 32).astype(np.float64)
    best = np.full(len(blocks), np.inf)
    top = np.abs(blocks).max(axis=1, keepdims=True) / -low
    for factor in np.arange(0.9, 1.6, 0.0005):
        for sign in (1, -1):
            d = (top * factor * sign).astype(np.float16).astype(np.float64)
            q = np.clip(np.rint(blocks / d), low, high)
            best = np.minimum(best, np.square(blocks - q * d).sum(axis=1))
    ours = block_errors(decode(quantize(numbers, fmt), fmt, numbers.shape[1]), numbers)
    assert ours.sum() < best.sum() * slack


# The statement in the module's docstring, one block and one operation at a time


def stated(x: np.ndarray, fmt: str) -> bytes:
    low, high = RANGES[fmt]
    x = np.clip(x, F(-(2**24)), F(2**24))

    def total(v: np.ndarray) -> np.float32:
        v = list(v)
        while len(v) > 1:
            half = len(v) // 2
            v = [v[i] + v[half + i] for i in range(half)]
        return v[0]

    def f16(v: np.float32) -> np.float32:
        rounded = F(np.float16(min(max(v, F(-65504)), F(65504))))
        return F(0) if rounded == 0 else rounded

    def inverse(d: np.float32) -> np.float32:
        return F(0) if d == 0 else F(1) / d

    def codes(v: list[np.float32]) -> np.ndarray:
        return np.array([min(max(np.rint(one), F(low)), F(high)) for one in v], F)

    def choose(d: np.float32, m: np.float32) -> tuple[np.float32, np.ndarray]:
        q = codes([(one - m) * inverse(d) for one in x])
        error = np.array([one - (code * d + m) for one, code in zip(x, q, strict=True)], F)
        return total(error * error), q

    candidates: list[tuple[np.float32, np.float32]] = []
    if fmt == "q4_1":
        least = x.min()
        extent = x.max() - least
        y = x - least
        t = total(y)
        candidates.append((f16(extent / F(15)), f16(least)))
        for a, b in CANDIDATE_PAIRS:
            r = F(0) if extent < F(1e-30) else F(b - a) / extent
            q = codes([one * r + F(a) for one in y])
            s = total(q)
            n, p = F(32) * total(y * q) - t * s, F(32) * total(q * q) - s * s
            d = f16(n / p if n > 0 and p > 0 else extent / F(b - a))
            candidates.append((d, f16(least + (t - d * s) / F(32))))
    else:
        top = x[np.argmax(np.abs(x))]
        top = abs(top) if fmt == "q8_0" else top
        candidates.append((f16(top / F(127 if fmt == "q8_0" else -8)), F(0)))
        for k in CANDIDATES[fmt]:
            r = F(0) if abs(top) < F(1e-30) else F(k) / top
            q = codes([one * r for one in x])
            s = total(q * q)
            candidates.append((f16(total(x * q) / s) if s else F(0), F(0)))
    best = min(range(len(candidates)), key=lambda i: choose(*candidates[i])[0])
    d, m = candidates[best]
    q = choose(d, m)[1]
    if fmt == "q8_0":
        return np.float16(d).tobytes() + q.astype(np.int8).tobytes()
    q = (q + F(8) if fmt == "q4_0" else q).astype(np.uint8)
    return (
        np.float16(d).tobytes() + (np.float16(m).tobytes() if fmt == "q4_1" else b"") + (q[:16] | q[16:] << 4).tobytes()
    )


numbers_of_any_size = st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-2, 2, width=32) | st.just(0.0)


@examples(150)
@given(st.sampled_from(FORMATS), arrays(np.float32, 32, elements=numbers_of_any_size))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_it_is_the_algorithm_that_is_stated(fmt: str, x: np.ndarray) -> None:
    assert quantize(x[None], fmt).tobytes() == stated(x, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "far from zero", "on a grid", "tiny"])
def test_it_is_the_algorithm_that_is_stated_on_usual_numbers(fmt: str, kind: str) -> None:
    numbers = drawn(kind, 2, 256)
    expected = b"".join(stated(x, fmt) for x in numbers.reshape(-1, 32))
    assert quantize(numbers, fmt).tobytes() == expected


# What is not usual


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [("q8_0", b"\0\0" + b"\0" * 32), ("q4_0", b"\0\0" + b"\x88" * 16), ("q4_1", b"\0\0\0\0" + b"\0" * 16)],
)
def test_a_block_of_zeros(fmt: str, expected: bytes) -> None:
    for zero in (0.0, -0.0, 1e-40, -1e-38):
        assert quantize(np.full((1, 64), zero, np.float32), fmt).tobytes() == expected * 2


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(fmt: str, value: float) -> None:
    numbers = drawn("normal", 50)
    numbers[37, 999] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(numbers, fmt)


@pytest.mark.parametrize(("fmt", "most"), [("q8_0", 65504 * 127), ("q4_0", 65504 * 8), ("q4_1", 65504 * 16)])
@pytest.mark.parametrize("size", [1e6, 1e9, 3e38])
def test_what_no_scale_reaches_becomes_the_largest_there_is(fmt: str, most: float, size: float) -> None:
    numbers = np.full((1, 32), size, np.float32)
    numbers[0, ::2] = 0
    found = decode(quantize(numbers, fmt), fmt, 32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, 1], min(size, most), rtol=0.005 if fmt == "q8_0" else 0.15)
    assert np.abs(found[0, ::2]).max() <= max(size, most) * 0.15


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_and_runs_of_them_are_quantized_alike(fmt: str) -> None:
    """Blocks do not see each other: what is quantized in pieces is the same."""
    numbers = drawn("heavy tails", 200, 352)
    whole = quantize(numbers, fmt)
    np.testing.assert_array_equal(np.concatenate([quantize(numbers[:77], fmt), quantize(numbers[77:], fmt)]), whole)
    np.testing.assert_array_equal(
        quantize(numbers[:, 32:64], fmt), whole[:, whole.shape[1] // 11 : whole.shape[1] // 11 * 2]
    )
    assert quantize(numbers[:0], fmt).shape == (0, whole.shape[1])
