"""The kernels of the extension against their NumPy twins, at every level of this processor, and what the binding refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.formats import EVERY_FORMAT
from tests.support.kv import one
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends import load_backend
from tpimpi.compute.backends.native import QUANTIZED_HERE, NativeBackend
from tpimpi.compute.formats import FORMATS, WEIGHT_FORMATS, is_quantized
from tpimpi.compute.formats.packed import Matrix, encode, pack, pack_with_numpy, packed_bytes, values
from tpimpi.compute.formats.quantize import quantize
from tpimpi.errors import InputError

native = pytest.importorskip("tpimpi._native", reason="tpimpi was installed without its native kernels")
LEVELS = native.levels()
TWIN = load_backend("numpy", 1)
BACKENDS = {level: NativeBackend(1, level) for level in LEVELS}


def matrix(random: np.random.Generator, fmt: str, rows: int, columns: int) -> Matrix:
    return pack(encode(random.standard_normal((rows, columns), dtype=np.float32), fmt), fmt, columns)


def assert_same(found: np.ndarray, expected: np.ndarray, size: float, what: str = "") -> None:
    """Equal to within rounding, where numbers of about `size` were summed."""
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg=what)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * size, err_msg=what)


@pytest.mark.parametrize("level", LEVELS)
@examples(60)
@given(
    fmt=st.sampled_from(WEIGHT_FORMATS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    positions=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_linear(level: str, fmt: str, rows: int, columns: int, positions: int, bias: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    w, x = matrix(random, fmt, rows, columns), random.standard_normal((positions, columns), dtype=np.float32)
    b = random.standard_normal(rows, dtype=np.float32) if bias else None
    found, expected = BACKENDS[level].linear(x, w, b), TWIN.linear(x, w, b)
    assert_same(found, expected, float(np.abs(values(w)).sum(axis=1).max() * np.abs(x).max()), f"{fmt} {level}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_linear_of_many_rows_with_any_number_of_threads(level: str, fmt: str) -> None:
    random = np.random.default_rng(3)
    w, x = matrix(random, fmt, 1111, 544), random.standard_normal((19, 544), dtype=np.float32)
    alone = BACKENDS[level].linear(x, w)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(NativeBackend(threads, level).linear(x, w), alone)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_linear_with_hostile_values(level: str, fmt: str) -> None:
    """Zeros, all-zero blocks, weights at the ends of the format; a position that is not finite spoils itself alone."""
    weights = np.zeros((48, 96), np.float32)
    weights[1, :32] = 3
    weights[2] = np.linspace(-65504, 65504, 96)
    weights[3, 5] = 0.9 * min(FORMATS[fmt].largest, 1e7)  # nearly the largest scale
    weights[4, 64:] = -1e-7  # f16 scales below its normal numbers
    x = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    x[1] = 0
    x[2, 32:64] = 0
    x[3, 70] = np.nan
    x[4, 3] = np.inf
    x[5] *= 1e-35
    x[6] *= 1e30 if is_quantized(fmt) else 1
    w = pack(encode(weights, fmt), fmt, 96)
    found, expected = BACKENDS[level].linear(x, w), TWIN.linear(x, w)
    if not is_quantized(fmt):  # inf times zero is NaN there too, but which rows of an infinity are NaN is the format's
        assert np.isnan(found[3]).all() and not np.isfinite(found[4]).any()
    else:
        assert np.isnan(found[3]).all() and np.isnan(found[4]).all()
    for row in (0, 1, 2, 5, 6):
        assert np.isfinite(found[row]).all()
        assert_same(found[row], expected[row], float(np.abs(weights).sum(axis=1).max() * np.abs(x[row]).max()))


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_scale(level: str, fmt: str) -> None:
    """d = 65504 in every block, put there by hand: nothing overflows on the way."""
    stored = encode(np.ones((16, 32), np.float32), fmt)
    stored[:, :2] = np.frombuffer(np.float16(65504).tobytes(), np.uint8)
    stored[:, 4:] = 0x77  # codes that are not zero in any format
    w, x = pack(stored, fmt, 32), np.full((1, 32), 1e20, np.float32)
    expected = TWIN.linear(x, w)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 1e25
    assert_same(BACKENDS[level].linear(x, w), expected, float(np.abs(expected).max()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_a_rows_numbers_do_not_depend_on_the_rows_beside_it(level: str, fmt: str) -> None:
    """Batches, drafts and chunks of a prompt change no answer: bit for bit, with any number of threads."""
    random = np.random.default_rng(5)
    for rows, columns, most in ((16 * 9 + 5, 352, 17), (64, 33, 17), (35, 1088, 70)):  # the last: of several rounds
        w, x = matrix(random, fmt, rows, columns), random.standard_normal((most, columns), dtype=np.float32)
        alone = np.concatenate([BACKENDS[level].linear(x[[i]], w) for i in range(most)])
        for positions in (*range(2, 18), most):
            np.testing.assert_array_equal(BACKENDS[level].linear(x[:positions], w), alone[:positions])
        np.testing.assert_array_equal(NativeBackend(3, level).linear(x, w), alone)


@pytest.mark.parametrize("level", LEVELS)
@examples(40)
@given(
    heads=st.integers(1, 9),
    half_dim=st.integers(1, 70),
    start=st.integers(0, 200),
    positions=st.integers(2, 20),
    window=st.integers(0, 150),
    f16=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_query_does_not_depend_on_the_queries_beside_it(
    level: str, heads: int, half_dim: int, start: int, positions: int, window: int, f16: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    head_dim, stop, q_to_kv = 2 * half_dim, start + positions, (0,) * heads
    k, v = random.standard_normal((2, 1, stop, head_dim)).astype(np.float16 if f16 else np.float32)
    q = 2 * random.standard_normal((positions, heads, head_dim), dtype=np.float32)
    spec = AttentionSpec(head_dim**-0.5, 3.0 if seed % 3 == 0 else 0.0, window)
    sinks = random.standard_normal(heads, dtype=np.float32) if seed % 2 else None
    together = BACKENDS[level].attention(q, *one(k, v, start, 16 * (1 + seed % 5), seed), q_to_kv, spec, sinks)
    for i in (0, positions // 2, positions - 1):
        seen = start + i + 1
        cut = [np.ascontiguousarray(of[:, :seen]) for of in (k, v)]
        alone = BACKENDS[level].attention(q[[i]], *one(*cut, start + i), q_to_kv, spec, sinks)
        np.testing.assert_array_equal(alone[0], together[i])
        first = None if sinks is None else sinks[:1]
        alone = BACKENDS[level].attention(np.ascontiguousarray(q[[i]][:, :1]), *one(*cut, start + i), (0,), spec, first)
        np.testing.assert_array_equal(alone[0, 0], together[i, 0])


@pytest.mark.parametrize("level", LEVELS)
@examples(30)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half_dim=st.integers(1, 70),
    start=st.integers(0, 70),
    positions=st.integers(1, 20),
    window=st.integers(0, 40),
    f16=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_attention(
    level: str, kv_heads: int, group: int, half_dim: int, start: int, positions: int, window: int, f16: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    heads, head_dim, stop = kv_heads * group, 2 * half_dim, start + positions
    kv = one(
        *random.standard_normal((2, kv_heads, stop, head_dim)).astype(np.float16 if f16 else np.float32), start, 32
    )
    q = 2 * random.standard_normal((positions, heads, head_dim), dtype=np.float32)
    q_to_kv = tuple(random.integers(0, kv_heads, heads).tolist())
    spec = AttentionSpec(0.3, 2.5, window) if seed % 3 == 0 else AttentionSpec(head_dim**-0.5, window=window)
    expected = TWIN.attention(q, *kv, q_to_kv, spec)
    for threads in (1, 3):
        found = NativeBackend(threads, level).attention(q, *kv, q_to_kv, spec)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 576), (3, 70), (4, 5, 64), (1, 1)])
def test_norms_and_activations(level: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    x, weight = (
        4 * random.standard_normal(shape, dtype=np.float32),
        random.standard_normal(shape[-1]).astype(np.float32),
    )
    assert_same(BACKENDS[level].rms_norm(x, weight, 1e-5), TWIN.rms_norm(x, weight, 1e-5), 1)
    gate = np.concatenate([x.ravel(), np.array([0, -200, 200, -1e30, 1e30, -87.5, -0.0], np.float32)])
    up = np.concatenate([x.ravel()[::-1], np.full(7, 2, np.float32)])
    assert_same(BACKENDS[level].swiglu(gate, up), TWIN.swiglu(gate, up), 1)
    assert_same(BACKENDS[level].geglu(gate, up), TWIN.geglu(gate, up), 1)
    assert_same(BACKENDS[level].clamped_swiglu(gate, up, 7.0), TWIN.clamped_swiglu(gate, up, 7.0), 1)
    rows = x.reshape(-1, shape[-1])
    np.testing.assert_array_equal(
        BACKENDS[level].fixed_rms_norm(rows, weight, 1e-5), TWIN.fixed_rms_norm(rows, weight, 1e-5)
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
def test_no_positions_have_no_results(level: str, fmt: str) -> None:
    w = matrix(np.random.default_rng(1), fmt, 64, 256)
    assert BACKENDS[level].linear(np.zeros((0, 256), np.float32), w).shape == (0, 64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 70, 128])
def test_rope(level: str, head_dim: int) -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((5, 3, head_dim), dtype=np.float32)
    phases = random.uniform(0, 100, (5, head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(phases), np.sin(phases)
    for half in {head_dim // 2, head_dim // 4}:
        some = np.ascontiguousarray(cos[:, :half]), np.ascontiguousarray(sin[:, :half])
        assert_same(BACKENDS[level].rope(x, *some), TWIN.rope(x, *some), 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", QUANTIZED_HERE)
def test_quantize_gives_the_bytes_of_its_twin(level: str, fmt: str) -> None:
    random = np.random.default_rng(5)
    rows, columns = (300, 96) if FORMATS[fmt].block_weights == 32 else (75, 512)
    sizes = 10.0 ** random.uniform(-12, 9, (rows, 1))
    x = (random.standard_normal((rows, columns)) * sizes).astype(np.float32)
    x[:5, :32] = 0
    x[5:40] = np.round(x[5:40] / sizes[5:40] * 4)
    x[40:44], x[44:48], x[48:50, ::2] = 7, -0.0, 3e38
    x[50:60] += 1000 * sizes[50:60].astype(np.float32)
    np.testing.assert_array_equal(BACKENDS[level].quantize(x, fmt), quantize(x, fmt))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            BACKENDS[level].quantize(np.where(np.arange(columns) == 77, np.float32(bad), x).astype(np.float32), fmt)


@examples(80)
@given(
    fmt=st.sampled_from(WEIGHT_FORMATS),
    start=st.integers(0, 24),
    units=st.integers(1, 20),
    less=st.integers(0, 31),
    rows=st.integers(1, 40),
)
def test_pack_gives_the_bytes_of_its_twin(fmt: str, start: int, units: int, less: int, rows: int) -> None:
    """Of any bytes: rows that fill no panel, cuts of columns within blocks, columns that fill none."""
    form, begin, size = FORMATS[fmt], 32 * start, 32 * units - less
    first = form.first_column(begin)
    stored = np.random.default_rng(units).integers(0, 256, (rows, form.row_bytes(begin + size + 256)), np.uint8)
    cut = stored[:, form.row_bytes(begin - first) :][:, : form.row_bytes(size, first)]
    expected = pack_with_numpy(cut, fmt, size, first)
    out = np.full(len(expected.data), 0xA5, np.uint8)
    native.pack(form.kernel_code, cut, size, first, out)
    np.testing.assert_array_equal(out, expected.data)
    np.testing.assert_array_equal(pack(cut, fmt, size, first).data, expected.data)


def test_what_cannot_be_packed_is_refused() -> None:
    q4_k, stored = FORMATS["q4_k"].kernel_code, np.zeros((17, 144), np.uint8)
    out = np.zeros(packed_bytes("q4_k", 17, 256), np.uint8)
    for arguments, what in [
        ((q4_k, stored[:, :-1], 256, 0, out), "row_bytes"),
        ((q4_k, stored, 257, 0, out), "row_bytes"),
        ((q4_k, stored, 0, 0, out), "columns must be"),
        ((q4_k, stored, 256, 16, out), "first is no place"),
        ((q4_k, np.zeros((17, 288), np.uint8)[:, ::2], 256, 0, out), "contiguous"),
        ((q4_k, stored, 256, 0, out[:-1]), "out has another size"),
        ((16, stored, 256, 0, out), "format is unknown"),
        ((-1, stored, 256, 0, out), "format is unknown"),
    ]:
        with pytest.raises(ValueError, match=what):
            native.pack(*arguments)


def test_what_does_not_fit_is_refused() -> None:
    session, x = native.Session("", 1), np.zeros((2, 64), np.float32)
    data, y = np.zeros(packed_bytes("f32", 16, 64), np.uint8), np.zeros((2, 16), np.float32)
    for arguments, what in [
        ((0, 16, 64, data[:-1], x, None, y), "weights have another size"),
        ((0, 17, 64, data, x, None, y), "weights have another size"),
        ((0, 16, 64, data, x[:, :32].copy(), None, y), "another number of columns"),
        ((0, 16, 64, data, x, np.zeros(15, np.float32), y), "bias"),
        ((0, 16, 64, data, x, None, y[:1]), "y must be"),
        ((16, 16, 64, data, x, None, y), "format is unknown"),
        ((0, 16, 64, data, x, None, y, 32), "first is no place"),
        ((5, 16, 64, data, x, None, y, 40), "first is no place"),
        ((5, 16, 64, data, x, None, y, 256), "first is no place"),
        ((-1, 16, 64, data, x, None, y), "format is unknown"),
    ]:
        with pytest.raises(ValueError, match=what):
            session.linear(*arguments)
    q, k = np.zeros((1, 2, 8), np.float32), np.zeros((3, 1, 16, 8), np.float32)
    blocks = np.zeros((3, 1, 16, 34), np.uint8)
    table = [2, 0, 1, -1]
    for pages, q_to_kv, sequence, position, window, what in [
        (k, (0, 1), 0, 3, 0, "not there"),
        (k, (0,), 0, 3, 0, "each query head"),
        (k, (0, 0), 1, 3, 0, "sequence is not there"),
        (k, (0, 0), -1, 3, 0, "sequence is not there"),
        (k, (0, 0), 0, 64, 0, "is in no page"),
        (k, (0, 0), 0, -1, 0, "is in no page"),
        (k, (0, 0), 0, 48, 1, "page that is to be read is not there"),
        (k[:2], (0, 0), 0, 16, 0, "page that is to be read is not there"),
        (np.zeros((3, 1, 32, 8), np.float32)[:, :, ::2], (0, 0), 0, 3, 0, "contiguous"),
        (k[:, :, :15].copy(), (0, 0), 0, 3, 0, "16 positions"),
        (k.astype(np.float64), (0, 0), 0, 3, 0, "f32, f16"),
        (np.zeros((3, 1, 16, 9), np.float32), (0, 0), 0, 3, 0, "head_dim numbers"),
        (blocks, (0, 0), 0, 3, 0, "multiple of 32"),
        (k, (0, 0), 0, 3, -1, "window"),
    ]:
        of = (np.array([sequence], np.int32), np.array([position], np.int32), np.array([table], np.int32))
        with pytest.raises(ValueError, match=what):
            session.attention(q, pages, pages, *of, q_to_kv, window, 1.0, 0.0, None, np.zeros_like(q))
    of = (np.array([0], np.int32), np.array([31], np.int32), np.array([table], np.int32))
    with pytest.raises(ValueError, match="KV head is not there"):
        session.store(q, q, k, k, *of, 0)
    with pytest.raises(InputError, match=r"this processor has .*portable"):
        NativeBackend(1, "mmx")


@pytest.mark.parametrize("wrong", [np.zeros((2, 16)), np.zeros((2, 32), np.float32)[:, ::2]], ids=["f64", "strided"])
def test_a_result_is_never_written_into_a_copy(wrong: np.ndarray) -> None:
    session, data = native.Session("", 1), np.zeros(packed_bytes("f32", 16, 64), np.uint8)
    with pytest.raises(TypeError):
        session.linear(0, 16, 64, data, np.zeros((2, 64), np.float32), None, wrong)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs all of the address space")
def test_a_host_without_enough_threads_or_memory() -> None:
    """In a process of its own with little address space: one line for the user, and kernels that still work afterwards."""
    program = """
import resource
import numpy as np
from tpimpi.compute.backends.native import QUANTIZED_HERE, NativeBackend
from tpimpi.errors import InputError
from tpimpi.compute.formats.packed import encode, pack

one = NativeBackend(1)
w = pack(encode(np.ones((16, 64), np.float32), "q8_0"), "q8_0", 64)
x = np.ones((1, 64), np.float32)
expected = one.linear(x, w)
many = np.broadcast_to(x, (4_000_000, 64)).copy()
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    NativeBackend(1024)
    raise SystemExit("it started 1024 threads in 3 GiB")
except InputError as error:
    assert "--threads is 1024" in str(error), error
y = np.zeros((4_000_000, 16), np.float32)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 3 << 30))
try:
    one._session.linear(2, 16, 64, w.data, many, None, y)
    raise SystemExit("it had memory")
except MemoryError:
    pass
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
np.testing.assert_array_equal(one.linear(x, w), expected)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


# Each takes memory of every run; gguf alone is 6 MB, with sentencepiece, yaml and csv. Modules of tpimpi's: those of what
# this run does not do. (jinja2 brings hashlib, random and tempfile.)
UNUSED = {
    *("torch", "transformers", "gguf", "sentencepiece", "yaml", "numpy.ma", "typing_extensions", "matplotlib"),
    *("prompt_toolkit", "asyncio", "concurrent.futures", "email", "http.client", "ssl", "secrets"),
    *("difflib", "statistics", "argcomplete", "tpimpi.cli.chat", "tpimpi.cli.line_editor"),
    *("tpimpi.diagnostics.plots", "tpimpi.diagnostics.doctor", "tpimpi.diagnostics.planner"),
}


def test_a_run_imports_only_what_it_uses(smollm2, cache) -> None:
    """A whole run in a process of its own, from slices that are there, whose modules are looked through at its end."""
    program = """
import sys, atexit
import tpimpi
assert "torch" not in sys.modules
import tpimpi.cli.main
atexit.register(lambda: print("imported:", *sys.modules, file=sys.stderr))
tpimpi.cli.main.main(["--model", sys.argv[1], "--backend", "native", "--prompt", "Hi", "--max-tokens", "3", "--quiet"])
"""
    environment = {**os.environ, **cache}
    for _ in range(2):  # the first may make the slices
        done = subprocess.run(
            [sys.executable, "-c", program, str(smollm2)],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    imported = done.stderr.partition("imported: ")[2].split()
    assert "tpimpi.engine.model" in imported, "the run is not even there: the test sees nothing"
    assert UNUSED.intersection(imported) == set()
