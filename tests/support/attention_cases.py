"""Cases of attention over pages, and of how keys and values are stored, for cases.cpp."""

from __future__ import annotations

import numpy as np

from tests.support.kernel_cases import ATTENTION, EPS, STORE, TWIN, Case, same_bits, within
from tests.support.kv import paged
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.kv import CACHED_FORMATS, KVPages, Rows, row_layout, stored

NOTHING = np.zeros(0, np.float32)
Runs = list[tuple[int, int]]  # of each sequence: its first row's position, and how many rows it has


def attention_case(
    random: np.random.Generator,
    runs: Runs,
    head_dim: int,
    q_to_kv: list[int],
    window: int,
    fmt: str,
    page: int = 64,
    parts: int = 1,
    *,
    sharp: float = 1,
    scale: float | None = None,
    softcap: float = 0,
    sinks: np.ndarray = NOTHING,
) -> Case:
    """Beyond the positions that are there pages hold NaN, as do those before the pages that a window sees."""
    kv_heads, like = max(q_to_kv) + 1, np.zeros(0, row_layout(fmt, head_dim)[0])
    sequences = []
    for start, n in runs:
        k, v = random.standard_normal((2, kv_heads, start + n, head_dim), dtype=np.float32)
        sequences.append((stored(k, like), stored(v, like)))
    kv, tables = paged(sequences, page, int(random.integers(1 << 30)), head_dim)
    sequence = np.concatenate([np.full(n, number, np.int32) for number, (_, n) in enumerate(runs)])
    rows = Rows(sequence, np.concatenate([start + np.arange(n, dtype=np.int32) for start, n in runs]), tables)
    if window:
        for number, (start, _) in enumerate(runs):
            rows.tables[number, : max(0, start - window + 1) // page] = -1
    q = random.standard_normal((len(sequence), len(q_to_kv), head_dim), dtype=np.float32) * np.float32(sharp)
    spec = AttentionSpec(head_dim**-0.5 if scale is None else scale, softcap, window)
    name = f"attention {runs} head_dim={head_dim} {q_to_kv} window={window} {fmt} page={page} sharp={sharp}"
    name += f" scale={scale} cap={softcap}" if softcap else ""
    name += f" sinks={sinks}" if sinks.size else ""
    # An error of a score, relative to q k, is an error of a weight.
    tolerance = 5 * 16 * EPS * (max(1.0, sharp * head_dim**0.5) if sharp < 1e30 else 1)
    return case_of(name, q, kv, rows, q_to_kv, spec, parts, sinks, tolerance)


def case_of(
    name: str,
    q: np.ndarray,
    kv: KVPages,
    rows: Rows,
    q_to_kv: list[int],
    spec: AttentionSpec,
    parts: int,
    sinks: np.ndarray,
    tolerance: float,
) -> Case:
    with np.errstate(all="ignore"):
        expected = TWIN.attention(q, kv, rows, tuple(q_to_kv), spec, sinks if sinks.size else None)
    fmt = {"uint8": 2, "float16": 1, "float32": 0}[kv.k.dtype.name]
    form = [fmt, kv.head_dim, kv.page_size, kv.k.strides[0], kv.k.strides[1]]
    parameters = [*form, len(q), rows.tables.shape[1], len(q_to_kv), spec.window, parts]
    arrays = [q, kv.k, kv.v, np.array(q_to_kv, np.int64), np.array([spec.scale, spec.softcap], np.float32), sinks]
    arrays += [rows.sequence, rows.position, rows.tables]
    return Case(name, ATTENTION, parameters, arrays, q.shape, within(expected, tolerance))


def attention_cases(random: np.random.Generator) -> list[Case]:
    maps = [[0], [0, 1, 2], [0, 0, 0, 1, 1, 1], [1, 1, 0, 2, 2], [0] * 9, [0] * 20]
    alone = [(1, 0), (1, 62), (1, 64), (1, 301), (2, 60), (5, 0), (7, 119), (17, 0), (40, 50)]
    cases = []
    for fmt in CACHED_FORMATS:
        sizes = [2, 16, 20, 64, 70, 80, 128, 144] if fmt != "q8_0" else [32, 64, 96, 128, 160, 256]
        for number, head_dim in enumerate(sizes):
            runs: list[Runs] = [[(start, n)] for n, start in alone]
            runs += [[(70, 1), (3, 1), (200, 1)], [(0, 1), (130, 1), (64, 20), (63, 1), (5, 3), (0, 33), (127, 2)]]
            for of in runs:
                q_to_kv = maps[random.integers(len(maps))]
                window, page = int(random.choice([0, 0, 1, 3, 64, 100])), int(random.choice([16, 32, 64, 128, 48]))
                cases.append(attention_case(random, of, head_dim, q_to_kv, window, fmt, page, 1 + number % 3))
        for n in (1, 33):
            for sharp in (0, 30, 1e30):  # 1e30: one weight is 1, the others are 0
                cases.append(attention_case(random, [(100, n)], 32, [0, 0, 1], 0, fmt, 64, sharp=sharp))
    for n, head_dim, window in ((1, 40, 0), (3, 40, 0), (20, 40, 3), (1, 256, 64), (33, 16, 0)):
        for softcap, scale in ((0, 0.02), (2, 0.3), (50, 1), (1e30, 0.1)):  # the last caps nothing that is seen
            fmt, runs_of = "f16" if n == 3 else "f32", [(70, n), (9, 1)]
            cases.append(
                attention_case(
                    random, runs_of, head_dim, [0, 0, 1], window, fmt, 32, 2, sharp=2, scale=scale, softcap=softcap
                )
            )
    for n, start, window in ((1, 0, 0), (1, 130, 0), (3, 70, 16), (20, 0, 0), (33, 90, 40)):
        for sinks in ([0, 0, 0], [3, -2, 40], [-1e30, 200, -np.inf]):  # the last: a weight of 0, nearly all of it, none
            fmt, of_heads = "f16" if n == 3 else "f32", np.array(sinks, np.float32)
            cases.append(
                attention_case(random, [(start, n)], 40, [0, 0, 1], window, fmt, parts=2, sharp=2, sinks=of_heads)
            )
    return cases + nan_cases(random)


def nan_cases(random: np.random.Generator) -> list[Case]:
    """A NaN, and infinite scores, make NaN of the queries of a sequence that see them, and of no other sequence's."""
    cases = []
    for n in (1, 9):
        sequences = [random.standard_normal((2, 2, size, 32), dtype=np.float32) for size in (70 + n, 40)]
        (k, v), _ = sequences
        k[0, 70, 0], v[1, 70 + n - 1, 0] = np.inf, np.nan
        kv, tables = paged([(one[0], one[1]) for one in sequences], 32, 5)
        position = np.concatenate([70 + np.arange(n), 39 + np.arange(1)]).astype(np.int32)
        rows = Rows((np.arange(n + 1) == n).astype(np.int32), position, tables)
        q, spec = random.standard_normal((n + 1, 2, 32), dtype=np.float32), AttentionSpec(32**-0.5)
        case = case_of(f"attention nan {n}", q, kv, rows, [0, 1], spec, 2, NOTHING, 1e-4)
        with np.errstate(invalid="ignore"):
            expected = TWIN.attention(q, kv, rows, (0, 1), spec)
            if n < 9:  # of few queries what is not seen is left out; of many it is multiplied by zero, as the twin does
                for row in range(n):
                    one = Rows(rows.sequence[[row]], rows.position[[row]], tables)
                    expected[row] = TWIN.attention(q[[row]], kv, one, (0, 1), spec)[0]
        assert np.isnan(expected[0]).any() and np.isfinite(expected[n]).all()
        case.check = within(expected, 1e-4)
        cases.append(case)
    return cases


def store_cases(random: np.random.Generator) -> list[Case]:
    """The bytes of the twin at every level, so that no two levels differ; and nothing between the rows is touched."""
    hostile = [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519,
        65520,
        -1e30,
        3.4e38,
        1e-40,
        2**-24,
        2**-25,
        2**-26,
        6e-8,
    ]
    hostile += [1 + 2**-11, 1 + 3 * 2**-11, 6.1e-5, 6.09e-5, 8319008, 8.4e6]
    cases = []
    for number, fmt in enumerate(CACHED_FORMATS):
        for head_dim in (2, 20, 64, 70) if fmt != "q8_0" else (32, 96):
            n = 40
            x = random.standard_normal((n, head_dim), dtype=np.float32)
            x *= np.logspace(-9, 6, n, dtype=np.float32)[:, None]
            x[0] = 0
            x[1:22, 1] = hostile
            x[30], x[31] = np.float32(2**-24), np.linspace(-1, 1, head_dim, dtype=np.float32)
            dtype, row = row_layout(fmt, head_dim)
            size, stride = row * dtype.itemsize, row * dtype.itemsize + 4
            with np.errstate(invalid="ignore", over="ignore"):
                of = stored(x, np.zeros(0, dtype))
            expected = np.full((n, stride), 0xFF, np.uint8)
            expected[:, :size] = of.view(np.uint8).reshape(n, size)
            exact = expected.reshape(-1)[: n * stride - 4]

            def check(found: np.ndarray, exact: np.ndarray = exact, fmt: str = fmt) -> None:
                if fmt == "f16":  # which NaN it is, and the sign of one, are nobody's concern
                    same_bits(exact.view(np.float16))(found.view(np.float16))
                else:
                    same_bits(exact)(found)

            parameters, byte = [number, head_dim, n, stride], np.dtype(np.uint8)
            cases.append(Case(f"store {fmt} {head_dim}", STORE, parameters, [x], exact.shape, check, byte))
    return cases
