"""Quantizing: numbers to GGML's blocks of 32 (see formats), with the least squared error of each block that a search finds.

For a block x of 32 numbers a fixed list of candidates is tried. Each starts from a grid that is laid through the block's
extremes, and is refined by least squares; its scale d (and minimum m) is rounded to f16, the codes are chosen for the
rounded numbers, and the candidate with the least sum of squared errors is taken. GGML's own choice is the first candidate,
so no block is worse than GGML's (on normally distributed numbers the squared error is 0.79 of its in q8_0, 0.89 in q4_0,
0.78 in q4_1).

The algorithm, exactly; another implementation that follows it gives the same bytes. All arithmetic is IEEE f32, rounded to
nearest even after each single operation (no fused multiply-add), evaluated as the parentheses say.

    SUM v       of 32 numbers: v[0:16] + v[16:32], then the halves of those 16 numbers, and so on down to one
    RINT v      to the nearest integer, ties to even
    CLAMP       to the codes' range: -127..127 (q8_0), -8..7 (q4_0), 0..15 (q4_1)
    F16 v       limited to +-65504, then rounded to f16, ties to even; zero is +0. So no scale becomes infinite
    INV v       1 / v, or 0 where v is 0

0. ValueError where a number is not finite. x is limited to +-2^24, which is beyond what any of the formats can hold.
1. q8_0 and q4_0: top is the number of largest magnitude, the first one of several; for q8_0 its magnitude.
   First candidate: d = F16(top / 127), or F16(top / -8) for q4_0.
   Then for each k of CANDIDATES, in order: r = k / top, or 0 where |top| < 1e-30;
       q = CLAMP(RINT(x * r)); s = SUM(q * q); d = F16(SUM(x * q) / s), or 0 where s is 0.
   Each candidate: q = CLAMP(RINT(x * INV(d))); its error is SUM((x - (q * d)) * (x - (q * d))).
2. q4_1: low = min x; range = max x - low; y = x - low; t = SUM(y).
   First candidate: d = F16(range / 15), m = F16(low).
   Then for each (a, b) of CANDIDATE_PAIRS, in order, which lays low on a and max x on b: r = (b - a) / range, or 0 where
   range < 1e-30; q = CLAMP(RINT((y * r) + a)); s = SUM(q); n = (32 * SUM(y * q)) - (t * s);
       p = (32 * SUM(q * q)) - (s * s); d = F16(n / p), or F16(range / (b - a)) where n or p is not above 0;
       m = F16(low + ((t - (d * s)) / 32)).
   Each candidate: q = CLAMP(RINT((x - m) * INV(d))); its error is SUM(e * e), where e = x - ((q * d) + m).
3. The first of the candidates with the least error gives d, m and q. Stored are q as int8 (q8_0), q + 8 (q4_0), or q (q4_1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tpimpi.compute.arrays import F32, Bytes

BLOCK_WEIGHTS = 32
# The code at which the number of largest magnitude is laid.
CANDIDATES: dict[str, tuple[float, ...]] = {
    "q8_0": (127, 126, 125, 124, 123, 122, 121, 120),
    "q4_0": (-8, -8.5, -7.25, -8.75, -7.75, -8.25, -9, -7, -7.5, 7.5, -6.75, 8),
}
# The codes at which the least and the greatest number are laid.
CANDIDATE_PAIRS: tuple[tuple[float, float], ...] = (
    *((0, 15), (0, 15.5), (-0.5, 15), (-0.25, 15.25), (0.25, 15.5), (0, 14.75), (1, 15)),
    *((0.25, 15), (0, 15.25), (-0.25, 15), (-0.5, 14.75), (0, 14), (1, 14), (-0.25, 14)),
)
_CODES = {"q8_0": (-127, 127), "q4_0": (-8, 7), "q4_1": (0, 15)}
_BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
_LARGEST_F16 = np.float32(65504)
_LIMIT = np.float32(2**24)
_SMALLEST = np.float32(1e-30)
_SLAB_BLOCKS = 1024  # worked on at a time: 128 KiB an array, so that the few of them stay in the cache

Quantizer = Callable[[F32, str], Bytes]


def quantize(values: F32, fmt: str) -> Bytes:
    """Numbers [rows, columns] in q8_0, q4_0 or q4_1: uint8 [rows, columns / 32 * bytes a block]; the search is stated above.

    `columns` must be a multiple of 32. Peak memory: the result and a few MB. ValueError for numbers that are not finite.
    """
    rows, columns = values.shape
    assert columns % BLOCK_WEIGHTS == 0, columns
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, BLOCK_WEIGHTS)
    search = _search_affine if fmt == "q4_1" else _search_scale
    out = np.empty((len(blocks), _BLOCK_BYTES[fmt]), np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        for first in range(0, len(blocks), _SLAB_BLOCKS):
            # Blocks are columns here: a sum over a block adds whole rows.
            x = np.ascontiguousarray(blocks[first : first + _SLAB_BLOCKS].T)  # [32, blocks]
            if not np.isfinite(x).all():
                raise ValueError("holds numbers that are not finite")
            np.clip(x, -_LIMIT, _LIMIT, out=x)
            out[first : first + _SLAB_BLOCKS] = search(x, fmt)
    return out.reshape(rows, columns // BLOCK_WEIGHTS * _BLOCK_BYTES[fmt])


def _search_scale(x: F32, fmt: str) -> Bytes:
    """Blocks x [32, blocks] in q8_0 or q4_0: uint8 [blocks, bytes a block]."""
    low, high = _CODES[fmt]
    q, work = np.empty_like(x), np.empty_like(x)
    np.abs(x, out=work)
    top = work.max(axis=0) if fmt == "q8_0" else x[work.argmax(axis=0), np.arange(x.shape[1])]
    best_d = _f16(top / np.float32(127 if fmt == "q8_0" else -8))
    best_error = _scale_error(x, best_d, low, high, q, work)
    for k in CANDIDATES[fmt]:
        ratio = np.where(np.abs(top) < _SMALLEST, np.float32(0), np.float32(k) / top)
        _codes(np.multiply(x, ratio, out=q), low, high)
        squares = _sum(np.multiply(q, q, out=work))
        products = _sum(np.multiply(x, q, out=work))
        d = _f16(np.where(squares > 0, products / squares, np.float32(0)))
        error = _scale_error(x, d, low, high, q, work)
        better = error < best_error
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
    _codes(np.multiply(x, _inverse(best_d), out=q), low, high)
    if fmt == "q8_0":
        return _join([best_d], q.astype(np.int8).view(np.uint8))
    return _join([best_d], _nibbles(q + np.float32(8)))


def _scale_error(x: F32, d: F32, low: int, high: int, q: F32, work: F32) -> F32:
    """The squared error [blocks] of the best codes for the scales d [blocks]. `q` and `work` are overwritten."""
    _codes(np.multiply(x, _inverse(d), out=q), low, high)
    np.multiply(q, d, out=work)
    np.subtract(x, work, out=work)
    return _sum(np.multiply(work, work, out=work))


def _search_affine(x: F32, fmt: str) -> Bytes:
    """Blocks x [32, blocks] in q4_1: uint8 [blocks, bytes a block]."""
    low, high = _CODES[fmt]
    q, work = np.empty_like(x), np.empty_like(x)
    least = x.min(axis=0)
    extent = x.max(axis=0) - least
    y = x - least
    total = _sum(y)
    best_d, best_m = _f16(extent / np.float32(15)), _f16(least)
    best_error = _affine_error(x, best_d, best_m, low, high, q, work)
    for first, last in CANDIDATE_PAIRS:
        a, steps = np.float32(first), np.float32(last - first)
        ratio = np.where(extent < _SMALLEST, np.float32(0), steps / extent)
        np.multiply(y, ratio, out=q)
        _codes(np.add(q, a, out=q), low, high)
        codes = _sum(q)
        n = np.float32(32) * _sum(np.multiply(y, q, out=work)) - total * codes
        p = np.float32(32) * _sum(np.multiply(q, q, out=work)) - codes * codes
        d = _f16(np.where((n > 0) & (p > 0), n / p, extent / steps))
        m = _f16(least + (total - d * codes) / np.float32(32))
        error = _affine_error(x, d, m, low, high, q, work)
        better = error < best_error
        best_d, best_m = np.where(better, d, best_d), np.where(better, m, best_m)
        best_error = np.where(better, error, best_error)
    np.subtract(x, best_m, out=q)
    _codes(np.multiply(q, _inverse(best_d), out=q), low, high)
    return _join([best_d, best_m], _nibbles(q))


def _affine_error(x: F32, d: F32, m: F32, low: int, high: int, q: F32, work: F32) -> F32:
    """As `_scale_error`, with minima m [blocks]."""
    np.subtract(x, m, out=q)
    _codes(np.multiply(q, _inverse(d), out=q), low, high)
    np.multiply(q, d, out=work)
    np.add(work, m, out=work)
    np.subtract(x, work, out=work)
    return _sum(np.multiply(work, work, out=work))


def _codes(scaled: F32, low: int, high: int) -> None:
    """Round to the nearest code, in place."""
    np.rint(scaled, out=scaled)
    np.clip(scaled, np.float32(low), np.float32(high), out=scaled)


def _sum(v: F32) -> F32:
    """Sums over the blocks of v [32, blocks], in a fixed order: [blocks]."""
    while len(v) > 1:
        half = len(v) // 2
        v = v[:half] + v[half:]
    return v[0]


def _f16(v: F32) -> F32:
    """The nearest finite f16 of each number, as f32; no negative zero."""
    return np.clip(v, -_LARGEST_F16, _LARGEST_F16).astype(np.float16).astype(np.float32) + np.float32(0)


def _inverse(d: F32) -> F32:
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _nibbles(codes: F32) -> Bytes:
    """Codes [32, blocks] of 0 to 15, two a byte: uint8 [16, blocks]."""
    whole: Bytes = codes.astype(np.uint8)
    return np.bitwise_or(whole[:16], np.left_shift(whole[16:], 4))


def _join(numbers: list[F32], codes: Bytes) -> Bytes:
    """Whole blocks: the f16 numbers [blocks] each, then the bytes of codes [bytes, blocks]."""
    head = np.stack([number.astype("<f2") for number in numbers], axis=1).view(np.uint8)  # [blocks, 2 or 4]
    return np.concatenate([head, codes.T], axis=1)
