"""Whatever sizes and numbers a file gives the kernels, they read and write nothing outside of their arrays: what does not
fit is refused, and all that fits, of any bytes, is computed. Behind each array is memory that ends who touches it."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.formats import EVERY_FORMAT
from tests.support.guarded import guarded
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.packed import packed_bytes, row_bytes

native = pytest.importorskip("tpimpi._native", reason="tpimpi was installed without its native kernels")
SESSIONS = {level: native.Session(level, 1) for level in native.levels()}
levels = pytest.mark.parametrize("level", SESSIONS)
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 255, 256, 257, 512]))


def any_bytes(random: np.random.Generator, size: int) -> np.ndarray:
    return guarded(random.integers(0, 256, size, np.uint8))


def floats(random: np.random.Generator, *shape: int) -> np.ndarray:
    return guarded(random.standard_normal(shape, dtype=np.float32))


def room(*shape: int) -> np.ndarray:
    return guarded(np.zeros(shape, np.float32))


@levels
@pytest.mark.parametrize("fmt", EVERY_FORMAT)
@examples(20)
@given(rows=SIZES, columns=SIZES, first=st.integers(0, 7), positions=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_a_matrix_of_any_bytes(
    level: str, fmt: str, rows: int, columns: int, first: int, positions: int, seed: int
) -> None:
    random, first = np.random.default_rng(seed), 32 * first if FORMATS[fmt].block_weights == 256 else 0
    data, x = any_bytes(random, packed_bytes(fmt, rows, columns, first)), floats(random, positions, columns)
    y = room(positions, rows)
    SESSIONS[level].linear(FORMATS[fmt].kernel_code, rows, columns, data, x, floats(random, rows), y, first)


NUMBERS = st.sampled_from(
    [-(2**63), -1, 0, 1, 15, 16, 17, 31, 32, 64, 255, 256, 2**28, 2**28 + 1, 2**31, 2**62, 2**63 - 1]
)


@examples(300)
@given(
    code=st.integers(-1, 17),
    sizes=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    given=st.tuples(*[st.sampled_from([0, 1, 16, 32, 256])] * 5),
    data=st.sampled_from([0, 64, 512, 1024, 4096, 4352, 65536]),
)
def test_a_matrix_of_any_sizes_fits_or_is_refused(code: int, sizes: Any, given: Any, data: int) -> None:
    rows, columns, first = sizes
    positions, x_columns, y_rows, y_columns, bias = given
    random = np.random.default_rng(0)
    arrays = (
        any_bytes(random, data),
        floats(random, positions, x_columns),
        floats(random, bias),
        room(y_rows, y_columns),
    )
    for session in SESSIONS.values():
        try:
            session.linear(code, rows, columns, *arrays, first)
        except (ValueError, TypeError):
            continue
        fmt = next(name for name, form in FORMATS.items() if form.kernel_code == code)
        assert data == packed_bytes(fmt, rows, columns, first)
        assert (positions, columns, rows, bias) == (y_rows, x_columns, y_columns, rows)


@examples(200)
@given(
    code=st.integers(-1, 17),
    stored=st.tuples(st.integers(0, 20), st.sampled_from([1, 18, 34, 64, 110, 144, 288])),
    columns=NUMBERS,
    first=NUMBERS,
    out=st.sampled_from([0, 64, 1024, 4096, 4352]),
)
def test_rows_of_any_sizes_are_packed_or_refused(code: int, stored: Any, columns: int, first: int, out: int) -> None:
    random = np.random.default_rng(0)
    try:
        native.pack(
            code,
            any_bytes(random, stored[0] * stored[1]).reshape(stored),
            columns,
            first,
            guarded(np.zeros(out, np.uint8)),
        )
    except (ValueError, TypeError):
        return
    fmt = next(name for name, form in FORMATS.items() if form.kernel_code == code)
    assert stored[1] == row_bytes(fmt, columns, first) and out == packed_bytes(fmt, stored[0], columns, first)


INDEX = st.integers(-2, 7)


@levels
@examples(150)
@given(
    fmt=st.sampled_from(["f32", "f16", "q8_0"]),
    pages=st.integers(0, 4),
    head_dim=st.sampled_from([1, 2, 31, 32, 64]),
    rows=st.lists(
        st.tuples(INDEX, st.sampled_from([-(2**31), -1, 0, 1, 15, 16, 31, 32, 47, 48, 2**31 - 1])), max_size=6
    ),
    table=st.lists(st.lists(INDEX, min_size=2, max_size=2), max_size=3),
    q_to_kv=st.lists(INDEX, min_size=0, max_size=3),
    window=st.sampled_from([-1, 0, 1, 5, 40, 2**62]),
    seed=st.integers(0, 2**32),
)
def test_attention_over_any_pages(
    level: str, fmt: str, pages: int, head_dim: int, rows: Any, table: Any, q_to_kv: list[int], window: int, seed: int
) -> None:
    """And what is stored into them."""
    random, kv_heads, page = np.random.default_rng(seed), 2, 16
    row = head_dim // 32 * 34 if fmt == "q8_0" else head_dim
    dtype = {"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[fmt]
    whole = any_bytes(random, 2 * pages * kv_heads * page * row * np.dtype(dtype).itemsize)
    both = whole.view(dtype).reshape(2, pages, kv_heads, page, row)
    sequence, position = (guarded(np.array([one[of] for one in rows], np.int32)) for of in (0, 1))
    tables = guarded(np.array(table, np.int32).reshape(len(table), 2))
    q, y = floats(random, len(rows), len(q_to_kv), head_dim), room(len(rows), len(q_to_kv), head_dim)
    where = (sequence, position, tables)
    with np.errstate(all="ignore"):
        with contextlib.suppress(ValueError, TypeError):
            SESSIONS[level].attention(q, both[0], both[1], *where, q_to_kv, window, 1.0, 0.0, None, y)
        new = floats(random, len(rows), 2, head_dim)
        for first_head in (0, 1, -1, 2**62):
            try:
                SESSIONS[level].store(new, new, both[0], both[1], *where, first_head)
            except (ValueError, TypeError):
                continue
            assert first_head == 0


@levels
@examples(100)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 16, 17, 32])] * 4),
    rows=st.lists(st.integers(-2, 5), max_size=5),
    weights=st.integers(0, 5),
    biases=st.tuples(*[st.sampled_from([None, 16, 17, 32])] * 3),
    seed=st.integers(0, 2**32),
)
def test_experts_of_any_sizes(level: str, sizes: Any, rows: list[int], weights: int, biases: Any, seed: int) -> None:
    random, (columns, other, hidden, positions) = np.random.default_rng(seed), sizes

    def matrix(height: int, width: int) -> tuple[Any, ...]:
        return (FORMATS["q8_0"].kernel_code, height, width, 0, any_bytes(random, packed_bytes("q8_0", height, width)))

    use = (matrix(columns, hidden), matrix(other, hidden), matrix(hidden, columns))
    bias = tuple(None if size is None else floats(random, size) for size in biases)
    places = (guarded(np.array(rows, np.int32)), floats(random, weights))
    x, out = floats(random, positions, hidden), room(positions, hidden)
    try:
        SESSIONS[level].experts(x, [(*use, *bias, *places)], 0, 0.0, out)
    except (ValueError, TypeError):
        return
    assert columns == other and weights == len(rows) and all(0 <= row < positions for row in rows)
