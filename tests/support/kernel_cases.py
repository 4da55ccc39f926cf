"""What cases.cpp, the kernels' test program, gets and how it is judged; and the cases of norms, rotation and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tpimpi.compute.backends.reference import NumpyBackend

TWIN = NumpyBackend(1)
LINEAR, RMS_NORM, FIXED_RMS_NORM, ROPE, SWIGLU, GEGLU, ATTENTION, QUANTIZE, READ, PACK, ROUTE, CLAMPED_SWIGLU = range(
    12
)
STORE = 12
EPS = np.finfo(np.float32).eps


@dataclass
class Case:
    """What the program gets, and how its result is judged: `check(result)` raises AssertionError."""

    name: str
    operation: int
    parameters: list[int]
    arrays: list[np.ndarray]
    shape: tuple[int, ...]
    check: Callable[[np.ndarray], None]
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    def to_bytes(self) -> bytes:
        def numbers(*all_of_them: int) -> bytes:
            return np.array(all_of_them, "<i8").tobytes()

        data = [np.ascontiguousarray(array).tobytes() for array in self.arrays]
        packed = b"".join(numbers(len(array)) + array for array in data)
        head = numbers(self.operation, len(self.parameters), *self.parameters, len(data))
        return head + packed + numbers(int(np.prod(self.shape)) * self.dtype.itemsize)


def within(expected: np.ndarray, tolerance: float | np.ndarray) -> Callable[[np.ndarray], None]:
    """Infinities and NaNs as expected, the others no further from it than `tolerance`."""

    def check(found: np.ndarray) -> None:
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(found[~finite], expected[~finite])
        assert not np.isnan(found[finite]).any(), "NaN where there should be none"
        off = np.abs(found[finite].astype(np.float64) - expected[finite])
        excess = off - np.broadcast_to(tolerance, found.shape)[finite]
        assert excess.max(initial=0) <= 0, f"{excess.max()} beyond the tolerance"

    return check


def same_bits(expected: np.ndarray) -> Callable[[np.ndarray], None]:
    return lambda found: np.testing.assert_array_equal(found, expected)


def rms_norm_cases(random: np.random.Generator) -> list[Case]:
    cases = []
    for number, (rows, size) in enumerate([(1, 1), (3, 15), (2, 16), (5, 17), (4, 64), (1, 100), (2, 576)]):
        for name, factor in (("", 1), (" zero", 0), (" large", 1e18), (" beyond range", 1e25), (" small", 1e-20)):
            x = random.standard_normal((rows, size), dtype=np.float32) * np.float32(factor)
            weight, eps = random.standard_normal(size, dtype=np.float32), np.float32(1e-5)
            with np.errstate(over="ignore"):
                expected = TWIN.rms_norm(x, weight, float(eps))
            check = within(expected, np.abs(expected) * 8 * EPS)
            cases.append(
                Case(
                    f"rms_norm{name} {rows}x{size}",
                    RMS_NORM,
                    [rows, size, number % 2],
                    [x, weight, eps],
                    x.shape,
                    check,
                )
            )
    x = np.ones((3, 20), np.float32)
    x[0, 3], x[1, 19] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        expected = TWIN.rms_norm(x, x[2], 1e-5)
    check = within(expected, 8 * EPS)
    cases.append(Case("rms_norm of nan", RMS_NORM, [3, 20, 0], [x, x[2], np.float32(1e-5)], x.shape, check))
    return cases


def rope_cases(random: np.random.Generator) -> list[Case]:
    cases = []
    shapes = [(1, 1, 2, 2), (3, 2, 20, 20), (2, 3, 64, 64), (4, 1, 70, 70), (1, 5, 128, 128)]
    shapes += [(3, 2, 64, 32), (2, 3, 96, 72), (1, 2, 5, 2), (2, 1, 18, 0)]
    for n, heads, head_dim, rotated in shapes:
        x = random.standard_normal((n, heads, head_dim), dtype=np.float32)
        angles = random.uniform(0, 6, (n, rotated // 2)).astype(np.float32)
        arrays = [x, np.cos(angles), np.sin(angles)]
        check = within(TWIN.rope(*arrays), 8 * EPS * np.abs(x).max())
        for in_place in (0, 1):
            parameters = [n, heads, head_dim, rotated, in_place]
            cases.append(Case(f"rope {rotated} of {x.shape}", ROPE, parameters, arrays, x.shape, check))
    return cases


def fixed_rms_norm_cases(random: np.random.Generator) -> list[Case]:
    """The bits of the twin at every level, so that no two levels differ."""
    cases = []
    for rows, size in [(1, 1), (3, 15), (2, 16), (5, 17), (4, 64), (1, 100), (2, 577), (3, 2560)]:
        for name, factor in (("", 1), (" zero", 0), (" large", 1e18), (" near the end", 1e37), (" small", 1e-30)):
            x = random.standard_normal((rows, size), dtype=np.float32) * np.float32(factor)
            x[:, :: size // 2 + 1] *= np.float32(1e-3)  # numbers of several sizes, whose sums depend on their order
            weight = random.standard_normal(size, dtype=np.float32)
            for eps in (1e-5, 1e-6):
                check = same_bits(TWIN.fixed_rms_norm(x, weight, eps))
                title = f"fixed_rms_norm{name} {rows}x{size} eps={eps}"
                arrays = [x, weight, np.float64(eps)]
                cases.append(Case(title, FIXED_RMS_NORM, [rows, size, int(eps < 1e-5)], arrays, x.shape, check))
    x = np.ones((3, 20), np.float32)
    x[0, 3], x[1, 19] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        check = same_bits(TWIN.fixed_rms_norm(x, x[2], 1e-5))
    cases.append(Case("fixed_rms_norm of nan", FIXED_RMS_NORM, [3, 20, 0], [x, x[2], np.float64(1e-5)], x.shape, check))
    return cases


def swiglu_cases(random: np.random.Generator) -> list[Case]:
    hostile = np.array([-np.inf, np.inf, np.nan, -0.0, 0, -200, 200, -3e38, 3e38, -88.8, 88.8, -104, 1e-40], np.float32)
    wide = np.concatenate([hostile, np.linspace(-120, 120, 20001, dtype=np.float32), random.normal(0, 2, 999)])
    cases = []
    for alias, gate in enumerate([wide.astype(np.float32), wide[:7].astype(np.float32), wide[-33:].astype(np.float32)]):
        up = random.standard_normal(gate.size, dtype=np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            # In f64, so that an error of the twin's own does not count.
            exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
            expected = np.where(np.isfinite(gate), exact, TWIN.swiglu(gate, up)).astype(np.float32)
        check = within(expected, np.abs(expected.astype(np.float64)) * 8 * EPS + 1e-35)
        cases.append(Case(f"swiglu {gate.size}", SWIGLU, [gate.size, alias], [gate, up], gate.shape, check))
    return cases


def geglu_cases(random: np.random.Generator) -> list[Case]:
    hostile = np.array([-np.inf, np.inf, np.nan, -0.0, 0, -200, 200, -3e38, 3e38, -1e13, 1e13, 1e-40], np.float32)
    wide = np.concatenate([hostile, np.linspace(-15, 15, 20001, dtype=np.float32), random.normal(0, 2, 999)])
    cases = []
    for alias, gate in enumerate([wide.astype(np.float32), wide[:7].astype(np.float32), wide[-33:].astype(np.float32)]):
        up = random.standard_normal(gate.size, dtype=np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            # In f64, and without the difference of 1 and tanh, in which f32 loses all that is small.
            g = gate.astype(np.float64)
            inner = 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
            exact = g / (1 + np.exp(-inner)) * up
            expected = np.where(np.isfinite(gate), exact, TWIN.geglu(gate, up)).astype(np.float32)
            # An error of what e is raised to, in last places, is as large a one of the power.
            tolerance = np.abs(expected.astype(np.float64)) * EPS * (8 + 2 * np.minimum(np.abs(inner), 110))
        check = within(expected, tolerance + 1e-35)
        cases.append(Case(f"geglu {gate.size}", GEGLU, [gate.size, alias], [gate, up], gate.shape, check))
    return cases
