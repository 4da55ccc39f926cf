"""The kernels of every level that this processor has, against the NumPy twin: a C++ program runs cases that are made here.

$TPIMPI_CASES is the command of that program (src/kernels/cases.cpp), built with sanitizers, say, or for another processor
and emulated. Where it is not set, the program is built, of the objects that the extension was linked of.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.attention_cases import attention_cases, store_cases
from tests.support.builds import extension_builds
from tests.support.kernel_cases import (
    EPS,
    LINEAR,
    PACK,
    QUANTIZE,
    READ,
    TWIN,
    Case,
    fixed_rms_norm_cases,
    geglu_cases,
    rms_norm_cases,
    rope_cases,
    same_bits,
    swiglu_cases,
    within,
)
from tests.support.launch import ROOT
from tests.support.router_cases import clamped_swiglu_cases, route_cases
from tpimpi.compute.backends.reference import rounded_activations
from tpimpi.compute.formats import FORMATS, WEIGHT_FORMATS
from tpimpi.compute.formats.packed import Matrix, decode, encode, pack, pack_with_numpy, unpack, values
from tpimpi.compute.formats.quantize import quantize

NOTHING = np.zeros(0, np.float32)
# Where codes stand in a block of the formats with minima: what is left when they are zero are the minima.
CODES_BESIDE_MINIMA = {"q4_1": (4, 20), "q5_1": (4, 24), "q4_k": (16, 144), "q5_k": (16, 176), "q2_k": (16, 80)}


# Cases


def linear_case(
    name: str, x: np.ndarray, weight: Matrix, bias: np.ndarray | None = None, parts: int = 1, slack: float = 4
) -> Case:
    with np.errstate(all="ignore"):
        expected = TWIN.linear(x, weight, bias)
        # Sums in another order differ by some last places of the sum of what is added, without regard to sign.
        size = np.abs(rounded_activations(x, weight.format).astype(np.float64)) @ np.abs(values(weight)).T.astype(float)
        if (codes := CODES_BESIDE_MINIMA.get(weight.format)) is not None:  # minima and scales are summed apart
            form = FORMATS[weight.format]
            blocks = unpack(weight).reshape(weight.rows, -1, form.block_bytes)
            blocks[:, :, slice(*codes)] = 0
            minima = decode(blocks.reshape(weight.rows, -1), weight.format, weight.columns, weight.first)
            size += 2 * np.abs(x).astype(np.float64) @ np.abs(minima).T.astype(float)
    arrays = [weight.data, x, NOTHING if bias is None else bias]
    parameters = [FORMATS[weight.format].kernel_code, weight.rows, weight.columns, len(x), parts, weight.first]
    tolerance = np.nan_to_num(size + (0 if bias is None else np.abs(bias))) * EPS * slack + 1e-37
    return Case(f"linear {name}", LINEAR, parameters, arrays, expected.shape, within(expected, tolerance))


def linear_cases(random: np.random.Generator) -> list[Case]:
    cases = []
    shapes = [(1, 1, 1), (16, 64, 1), (17, 33, 2), (15, 31, 3), (40, 70, 4), (33, 96, 5), (5, 130, 6), (48, 95, 7)]
    shapes += [(20, 40, 8), (16, 66, 9), (31, 160, 13), (35, 32, 16), (18, 129, 17), (32, 100, 33), (1, 576, 47)]
    for fmt in WEIGHT_FORMATS:
        for number, (rows, columns, positions) in enumerate(shapes):
            x = random.standard_normal((positions, columns), dtype=np.float32)
            weight = pack(encode(random.standard_normal((rows, columns), dtype=np.float32), fmt), fmt, columns)
            bias = random.standard_normal(rows, dtype=np.float32) if number % 2 else None
            cases.append(linear_case(f"{fmt} {rows}x{columns} n={positions}", x, weight, bias, 1 + number % 3))
        if FORMATS[fmt].block_weights == 256:
            for first, columns, positions in ((32, 64, 1), (64, 320, 2), (224, 33, 3), (96, 700, 8), (160, 96, 17)):
                stored = random_blocks(fmt, 19, FORMATS[fmt].blocks(columns, first), random)
                x = random.standard_normal((positions, columns), dtype=np.float32)
                name = f"{fmt} from column {first} {columns} n={positions}"
                cases.append(linear_case(name, x, pack(stored, fmt, columns, first)))
        cases += hostile_linear_cases(fmt, random)
    return cases


def hostile_linear_cases(fmt: str, random: np.random.Generator) -> list[Case]:
    rows, columns = 21, 75
    x = random.standard_normal((19, columns), dtype=np.float32)
    numbers = random.standard_normal((rows, columns), dtype=np.float32)
    weight = pack(encode(numbers, fmt), fmt, columns)
    blank = numbers.copy()
    blank[:, 32:64] = blank[3] = 0
    cases = [
        linear_case(f"{fmt} zero x", np.zeros_like(x), weight),
        linear_case(f"{fmt} zero weights", x, pack(encode(np.zeros_like(numbers), fmt), fmt, columns)),
        linear_case(f"{fmt} zero blocks", x, pack(encode(blank, fmt), fmt, columns)),
        linear_case(f"{fmt} tiny x", x * np.float32(1e-31), weight),
        linear_case(f"{fmt} large x", x * np.float32(1e30), weight),
    ]
    for name, value in (("nan", np.nan), ("infinite", np.inf), ("-infinite", -np.inf)):
        one = x.copy()
        one[2, 40] = one[11, 74] = value
        cases.append(linear_case(f"{fmt} {name} x", one, weight))
    form = FORMATS[fmt]
    if not form.is_quantized:
        return cases
    # Every code beside every scale that is finite: the largest, negative ones, subnormals; x at the ends of int8.
    columns = 2 * form.block_weights
    ends = np.where(random.integers(0, 2, (9, columns)), np.float32(127), np.float32(-127))
    for name, codes in (("any code", None), ("least code", 0), ("greatest code", 255), ("middle code", 0x80)):
        stored = random_blocks(fmt, 64, 2, random)
        if codes is not None:
            numbers = [slice(place, place + 2) for place in form.f16_offsets] or [slice(1)]
            blocks, kept = stored.reshape(64, 2, -1), stored.reshape(64, 2, -1).copy()
            blocks[:] = codes
            for place in numbers:
                blocks[:, :, place] = kept[:, :, place]
        cases.append(linear_case(f"{fmt} {name}", ends, pack(stored, fmt, columns), slack=16))
    return cases


def random_blocks(fmt: str, rows: int, blocks: int, random: np.random.Generator) -> np.ndarray:
    """Rows of any bytes, with scales and minima that are finite."""
    form = FORMATS[fmt]
    stored = random.integers(0, 256, (rows, blocks * form.block_bytes), np.uint8)
    if fmt == "mxfp4":
        stored.reshape(rows, blocks, -1)[:, :, 0] = random.integers(0, 230, (rows, blocks))
    for number, place in enumerate(form.f16_offsets):
        scales = random.integers(0, 1 << 16, (rows, blocks), np.uint16)
        some = np.array([65504, -65504, 2**-24, -(2**-24), 2**-14, 0, -0.0, 6.1e-5], "<f2").view("<u2")[:rows, None]
        scales[: len(some)] = np.roll(some, number)
        scales[~np.isfinite(scales.view("<f2"))] = 0
        stored.reshape(rows, blocks, -1)[:, :, place : place + 2] = scales[:, :, None].view(np.uint8)
    return stored


def quantize_cases(random: np.random.Generator) -> list[Case]:
    cases = []
    for fmt in ("q8_0", "q4_0", "q4_1", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs"):
        size = FORMATS[fmt].block_weights
        x = random.standard_normal((19, size), dtype=np.float32) * np.logspace(-9, 6, 19, dtype=np.float32)[:, None]
        x[4], x[5, 3], x[6] = 0, 1e-38, 3.4e38
        expected = quantize(x, fmt)
        parameters, byte = [FORMATS[fmt].kernel_code, len(x)], np.dtype(np.uint8)
        cases.append(Case(f"quantize {fmt}", QUANTIZE, parameters, [x], expected.shape, same_bits(expected), byte))
        for value in (np.nan, np.inf):
            bad = x.copy()
            bad[18, 31] = value
            refused = same_bits(np.full_like(expected, 255))
            cases.append(Case(f"quantize {fmt} {value}", QUANTIZE, parameters, [bad], expected.shape, refused, byte))
    return cases


def read_cases(random: np.random.Generator) -> list[Case]:
    data = random.integers(0, 1 << 64, 96, np.uint64)
    expected = data.sum(keepdims=True)
    return [Case("read", READ, [data.nbytes], [data], (1,), same_bits(expected), np.dtype(np.uint64))]


def pack_cases(random: np.random.Generator) -> list[Case]:
    """Rows of any bytes, alone and with others beside them; whole ones, and cuts within blocks."""
    cases, byte = [], np.dtype(np.uint8)
    for fmt, form in FORMATS.items():
        for rows, begin, size in [(1, 0, 32), (16, 0, 256), (35, 256, 864), (17, 64, 96), (5, 224, 300), (3, 96, 33)]:
            first = form.first_column(begin)
            stored = random.integers(0, 256, (rows, form.row_bytes(begin + size)), np.uint8)
            at, width = form.row_bytes(begin - first), form.row_bytes(size, first)
            expected = pack_with_numpy(stored[:, at : at + width], fmt, size, first).data
            parameters = [form.kernel_code, rows, size, first, stored.shape[1]]
            # From the first byte of the cut to the last one, so that one more is seen.
            cut = stored.reshape(-1)[at : (rows - 1) * stored.shape[1] + at + width]
            name = f"pack {fmt} {rows} {begin} {size}"
            cases.append(Case(name, PACK, parameters, [cut], expected.shape, same_bits(expected), byte))
    return cases


# Running them


@pytest.fixture(scope="module")
def program() -> list[str]:
    """The command of the program that runs cases; compiled again are only the sources that changed."""
    if command := os.environ.get("TPIMPI_CASES"):
        return shlex.split(command)
    for folder in extension_builds():
        if subprocess.run(["cmake", "--build", folder, "--target", "cases"], check=False).returncode == 0:
            return [str(folder / "cases")]
    folder = ROOT / "build" / "cases"  # the extension was built elsewhere, or by tools that are gone
    switches = ["-DTPIMPI_EXTENSION=OFF", "-DTPIMPI_CASES=ON", "-DTPIMPI_REQUIRED=ON"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *switches], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return [str(folder / "cases")]


@pytest.fixture(scope="module")
def run(program: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Case]], None]:
    """Runs cases on every level, and checks each result."""

    def run_all(cases: list[Case]) -> None:
        folder = tmp_path_factory.mktemp("run")
        (folder / "in").write_bytes(b"".join(case.to_bytes() for case in cases))
        result = subprocess.run([*program, folder / "in", folder / "out"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        output, at, levels, wrong = (folder / "out").read_bytes(), 0, [], []
        while at < len(output):
            length = int.from_bytes(output[at : at + 8], "little")
            levels.append(output[at + 8 : at + 8 + length].decode())
            at += 8 + length
            for case in cases:
                count = int(np.prod(case.shape))
                found = np.frombuffer(output, case.dtype, count, at).reshape(case.shape)
                at += found.nbytes
                try:
                    case.check(found)
                except AssertionError as error:
                    wrong.append(f"{levels[-1]}: {case.name}: {' '.join(str(error).split())[:300]}")
        assert at == len(output), "the output is not as long as the results"
        assert levels[-1] == "portable", levels
        assert not wrong, f"{len(wrong)} of {len(levels) * len(cases)} results:\n" + "\n".join(wrong[:40])

    return run_all


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        linear_cases,
        rms_norm_cases,
        fixed_rms_norm_cases,
        rope_cases,
        swiglu_cases,
        geglu_cases,
        clamped_swiglu_cases,
        route_cases,
        attention_cases,
        store_cases,
        quantize_cases,
        read_cases,
        pack_cases,
    ],
)
def test_kernel(run: Callable[[list[Case]], None], make: Callable[[np.random.Generator], list[Case]]) -> None:
    run(make(np.random.default_rng(11)))


def test_a_wrong_result_is_seen(run: Callable[[list[Case]], None]) -> None:
    """The checks can fail: a case whose expectation is one last place in a thousand off does."""
    x, weight = np.ones((2, 8), np.float32), pack(encode(np.ones((3, 8), np.float32), "f32"), "f32", 8)
    case = linear_case("wrong", x, weight)
    case.check = within(np.full((2, 3), 8.01, np.float32), 1e-4)
    with pytest.raises(AssertionError, match="wrong"):
        run([case])
