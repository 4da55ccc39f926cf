"""Quantizing to blocks of 256, and to iq4_nl: a search for scales, like that of search.py.

Numbers are [weights, columns] f32, each column a block or a part of one; errors are sums of squares over it. All
arithmetic is single operations in f32, and sums are taken in the order of the weights (as NumPy does over the first of
two axes, where the other is longer than 1), so that the kernels' twin of it gives the same bytes. For each
column a list of grids is tried, each refined by least squares. In blocks of 256 the scales of the parts are then
rounded to whole multiples of the block's f16 number, with the neighbours of the nearest tried too, and that number is
fitted once more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tpimpi.compute.arrays import F32, Array

_LARGEST_F16 = np.float32(65504)
_SMALLEST = np.float32(1e-30)  # of a column's extent

Levels = Callable[[F32], F32]  # the nearest level to each number, as a format's codes stand for


def even_levels(low: int, high: int) -> Levels:
    """Whole numbers from `low` to `high`."""
    return lambda v: np.clip(np.rint(v), np.float32(low), np.float32(high))


def listed_levels(values: F32) -> Levels:
    """The values of a sorted list."""
    borders = (values[1:] + values[:-1]) / 2
    return lambda v: values[np.searchsorted(borders, v)]


def to_f16(v: F32) -> F32:
    """The nearest finite f16 of each number, as f32; no negative zero."""
    return np.clip(v, -_LARGEST_F16, _LARGEST_F16).astype(np.float16).astype(np.float32) + np.float32(0)


def inverse(v: F32) -> F32:
    """1 / v, or 0 where v is 0 or nearly."""
    return np.where(np.abs(v) < _SMALLEST, np.float32(0), np.float32(1) / v)


def best_scale(x: F32, levels: Levels, grids: Sequence[float]) -> F32:
    """The scale [columns] with the least error; each of `grids` is where the number of largest magnitude is laid."""
    top = x[np.abs(x).argmax(axis=0), np.arange(x.shape[1])]
    best, least = np.zeros_like(top), np.square(x).sum(axis=0)
    for grid in grids:
        q = levels(x * (np.float32(grid) * inverse(top)))
        scale = (x * q).sum(axis=0) * inverse(np.square(q).sum(axis=0))
        error = np.square(x - scale * levels(x * inverse(scale))).sum(axis=0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def best_scale_and_minimum(x: F32, high: int, grids: Sequence[tuple[float, float]]) -> tuple[F32, F32]:
    """Scales and minima [columns], not above 0, for codes of 0 to `high`; a grid is where least and greatest are laid."""
    levels = even_levels(0, high)
    low = np.minimum(x.min(axis=0), 0)
    extent = x.max(axis=0) - low
    best_d, best_m = extent / np.float32(high), low
    least = np.square(x - (best_d * levels((x - low) * inverse(best_d)) + low)).sum(axis=0)
    count, total = np.float32(len(x)), x.sum(axis=0)
    for first, last in grids:
        q = levels((x - low) * (np.float32(last - first) * inverse(extent)) + np.float32(first))
        codes, products, squares = q.sum(axis=0), (x * q).sum(axis=0), np.square(q).sum(axis=0)
        d = (count * products - total * codes) * inverse(count * squares - codes * codes)
        m = (total - d * codes) / count
        d, m = np.where(m > 0, products * inverse(squares), d), np.minimum(m, 0)
        error = np.square(x - (d * levels((x - m) * inverse(d)) + m)).sum(axis=0)
        better = (error < least) & (d > 0)
        best_d, best_m = np.where(better, d, best_d), np.where(better, m, best_m)
        least = np.where(better, error, least)
    return best_d, best_m


def scales_of_parts(
    x: F32, parts: int, levels: Levels, grids: Sequence[float], range_: tuple[int, int]
) -> tuple[F32, Array, F32]:
    """Blocks x [weights, blocks] of so many parts with a whole scale each, in `range_`: d [blocks], scales, levels.

    Scales [parts, blocks]; levels [weights, blocks]; a weight is d * scale * level.
    """
    by_part = _parts(x, parts)
    scale = best_scale(by_part, levels, grids).reshape(parts, -1)
    top = scale[np.abs(scale).argmax(axis=0), np.arange(scale.shape[1])]
    d = to_f16(top / np.float32(range_[0]))

    def error_of(d: F32, whole: F32) -> tuple[F32, F32]:
        product = (d * whole).reshape(-1)
        q = levels(by_part * inverse(product))
        return np.square(by_part - product * q).sum(axis=0).reshape(parts, -1), q

    (whole,), q, _ = _best_neighbours([np.rint(scale * inverse(d))], range_, lambda found: error_of(d, found[0]))
    multiples = (whole[:, None] * q.reshape(len(by_part), parts, -1).transpose(1, 0, 2)).reshape(x.shape)
    fitted = to_f16((x * multiples).sum(axis=0) * inverse(np.square(multiples).sum(axis=0)))
    (old, _), (new, again) = error_of(d, whole), error_of(fitted, whole)
    better = new.sum(axis=0) < old.sum(axis=0)
    d = np.where(better, fitted, d)
    q = np.where(np.tile(better, parts), again, q)
    return d, whole, _whole(q, parts)


def scales_and_minima_of_parts(
    x: F32, parts: int, high: int, most: int, grids: Sequence[tuple[float, float]], *, plain: bool = False
) -> list[Array]:
    """Blocks x [weights, blocks] of so many parts, codes of 0 to `high`, scales and minima of 0 to `most`.

    d and dmin [blocks], scales and minima [parts, blocks], codes [weights, blocks]; a weight is
    d * scale * code - dmin * minimum. `plain`: d and dmin that are themselves the greatest scale and minimum are tried too.
    """
    by_part, levels = _parts(x, parts), even_levels(0, high)
    scale, low = (v.reshape(parts, -1) for v in best_scale_and_minimum(by_part, high, grids))
    found: list[Array] = []
    least = np.full(x.shape[1], np.inf, np.float32)
    for multiple in (most, 1) if plain else (most,):
        d, dmin = to_f16(scale.max(axis=0) / np.float32(multiple)), to_f16(-low.min(axis=0) / np.float32(multiple))
        nearest = [np.rint(scale * inverse(d)), np.rint(-low * inverse(dmin))]
        (whole, minima), q, error = _best_neighbours(nearest, (0, most), _error_with_minima(by_part, d, dmin, levels))
        better = error.sum(axis=0) < least
        made = [d, dmin, whole, minima, _whole(q, parts)]
        found = [np.where(better, new, old) for new, old in zip(made, found, strict=True)] if found else made
        least = np.minimum(least, error.sum(axis=0))
    return found


_ErrorOf = Callable[
    [list[F32]], tuple[F32, F32]
]  # of whole numbers [parts, blocks] each: errors [parts, blocks], levels


def _error_with_minima(by_part: F32, d: F32, dmin: F32, levels: Levels) -> _ErrorOf:
    def error_of(found: list[F32]) -> tuple[F32, F32]:
        product, minimum = (d * found[0]).reshape(-1), (dmin * found[1]).reshape(-1)
        q = levels((by_part + minimum) * inverse(product))
        return np.square(by_part - (product * q - minimum)).sum(axis=0).reshape(found[0].shape), q

    return error_of


def _best_neighbours(nearest: list[F32], range_: tuple[int, int], error_of: _ErrorOf) -> tuple[list[F32], F32, F32]:
    """Of whole numbers [parts, blocks] in `range_` and their neighbours those of least error, their levels, the error."""
    best = [np.clip(v, *range_) for v in nearest]
    least, codes = error_of(best)
    for steps in itertools.product((-1, 0, 1), repeat=len(nearest)):
        tried = [np.clip(v + np.float32(step), *range_) for v, step in zip(nearest, steps, strict=True)]
        error, q = error_of(tried)
        better = error < least
        best = [np.where(better, new, old) for new, old in zip(tried, best, strict=True)]
        codes = np.where(better.reshape(-1), q, codes)
        least = np.where(better, error, least)
    return best, codes, least


def _parts(x: F32, parts: int) -> F32:
    """Blocks [weights, blocks] as columns of their parts: [weights / parts, parts * blocks]."""
    return np.ascontiguousarray(x.reshape(parts, -1, x.shape[1]).transpose(1, 0, 2)).reshape(len(x) // parts, -1)


def _whole(by_part: F32, parts: int) -> F32:
    """Undoes `_parts`."""
    blocks = by_part.reshape(len(by_part), parts, -1).transpose(1, 0, 2)
    return np.ascontiguousarray(blocks).reshape(len(by_part) * parts, -1)
