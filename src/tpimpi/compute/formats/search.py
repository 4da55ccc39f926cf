"""Quantizing: numbers to GGML's blocks of 32, with the least squared error of each block that a search finds.

For a block x of 32 numbers a fixed list of candidates is tried. Each starts from a grid that is laid through the block's
extremes, and is refined by least squares; its scale d (and minimum m) is rounded to f16, the codes are chosen for the
rounded numbers, and the candidate with the least sum of squared errors is taken. GGML's own choice is the first candidate,
so no block is worse than GGML's (on normally distributed numbers the squared error is 0.79 of its in q8_0, 0.89 in q4_0,
0.78 in q4_1).

The algorithm, exactly; another implementation that follows it gives the same bytes. All arithmetic is IEEE f32, rounded to
nearest even after each single operation (no fused multiply-add), evaluated as the parentheses say.

    SUM v       of 32 numbers: v[0:16] + v[16:32], then the halves of those 16 numbers, and so on down to one
    RINT v      to the nearest integer, ties to even
    CLAMP       to the codes' range: -127..127 (q8_0), -8..7 (q4_0), 0..15 (q4_1), -16..15 (q5_0), 0..31 (q5_1)
    F16 v       limited to +-65504, then rounded to f16, ties to even; zero is +0. So no scale becomes infinite
    INV v       1 / v, or 0 where v is 0

0. ValueError where a number is not finite. x is limited to +-2^24, which is beyond what any of the formats can hold.
1. q8_0, q4_0, q5_0: top is the number of largest magnitude, the first one of several; for q8_0 its magnitude.
   First candidate: d = F16(top / 127), F16(top / -8) for q4_0, F16(top / -16) for q5_0.
   Then for each k of the format's CANDIDATES, in order: r = k / top, or 0 where |top| < 1e-30;
       q = CLAMP(RINT(x * r)); s = SUM(q * q); d = F16(SUM(x * q) / s), or 0 where s is 0.
   Each candidate: q = CLAMP(RINT(x * INV(d))); its error is SUM((x - (q * d)) * (x - (q * d))).
2. q4_1, q5_1: low = min x; range = max x - low; y = x - low; t = SUM(y).
   First candidate: d = F16(range / 15), or F16(range / 31) for q5_1; m = F16(low).
   Then for each (a, b) of its CANDIDATE_PAIRS, in order, which lays low on a and max x on b: r = (b - a) / range, or 0 where
   range < 1e-30; q = CLAMP(RINT((y * r) + a)); s = SUM(q); n = (32 * SUM(y * q)) - (t * s);
       p = (32 * SUM(q * q)) - (s * s); d = F16(n / p), or F16(range / (b - a)) where n or p is not above 0;
       m = F16(low + ((t - (d * s)) / 32)).
   Each candidate: q = CLAMP(RINT((x - m) * INV(d))); its error is SUM(e * e), where e = x - ((q * d) + m).
3. The first of the candidates with the least error gives d, m and q. Stored are q as int8 (q8_0), q + 8 (q4_0), q (q4_1),
   q + 16 (q5_0), or q (q5_1), of the last two the high bits apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpimpi.compute.arrays import F32

LIMIT = np.float32(2**24)  # beyond what any of the formats can hold
_LARGEST_F16 = np.float32(65504)
_SMALLEST = np.float32(1e-30)  # of a block's extent


def search_scale(
    x: F32, top: F32, top_code: float, candidates: Sequence[float], code_range: tuple[int, int]
) -> tuple[F32, F32]:
    """The best scales d [blocks] and codes q [32, blocks] for blocks x [32, blocks]: step 1 above.

    `top` [blocks] is what is laid on `top_code` first (as GGML does), then on each of the candidates.
    """
    low, high = code_range
    q, work = np.empty_like(x), np.empty_like(x)
    best_d = _f16(top / np.float32(top_code))
    best_error = _scale_error(x, best_d, low, high, q, work)
    for k in candidates:
        ratio = np.where(np.abs(top) < _SMALLEST, np.float32(0), np.float32(k) / top)
        _codes(np.multiply(x, ratio, out=q), low, high)
        squares = _sum(np.multiply(q, q, out=work))
        products = _sum(np.multiply(x, q, out=work))
        d = _f16(np.where(squares > 0, products / squares, np.float32(0)))
        error = _scale_error(x, d, low, high, q, work)
        better = error < best_error
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
    _codes(np.multiply(x, _inverse(best_d), out=q), low, high)
    return best_d, q


def _scale_error(x: F32, d: F32, low: int, high: int, q: F32, work: F32) -> F32:
    """The squared error [blocks] of the best codes for the scales d [blocks]. `q` and `work` are overwritten."""
    _codes(np.multiply(x, _inverse(d), out=q), low, high)
    np.multiply(q, d, out=work)
    np.subtract(x, work, out=work)
    return _sum(np.multiply(work, work, out=work))


def search_affine(
    x: F32, candidates: Sequence[tuple[float, float]], code_range: tuple[int, int]
) -> tuple[F32, F32, F32]:
    """The best scales d and minima m [blocks] and codes q [32, blocks] for blocks x [32, blocks]: step 2 above.

    Of each candidate the first number is the code that a block's least number is laid on, the second that of its greatest.
    """
    low, high = code_range
    q, work = np.empty_like(x), np.empty_like(x)
    least = x.min(axis=0)
    extent = x.max(axis=0) - least
    y = x - least
    total = _sum(y)
    best_d, best_m = _f16(extent / np.float32(high)), _f16(least)
    best_error = _affine_error(x, best_d, best_m, low, high, q, work)
    for first, last in candidates:
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
    return best_d, best_m, q


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
