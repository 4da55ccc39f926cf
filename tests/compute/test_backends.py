"""Each backend against the NumPy twin, and the twin against torch's own functions where there is one."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, eager_attention_forward

from tests.support.formats import EVERY_FORMAT, EVERY_QUANTIZED
from tests.support.kv import one
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends import has_native, load_backend
from tpimpi.compute.backends.reference import rounded_activations
from tpimpi.compute.formats.packed import decode, encode, pack, row_bytes

TWIN, TORCH = load_backend("numpy", 1), load_backend("torch", 1)
BACKENDS = [TWIN, TORCH, *([load_backend("native", 1)] if has_native() else [])]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def product_as_specified(x: np.ndarray, stored: np.ndarray, fmt: str, columns: int) -> np.ndarray:
    """x times blocks in row form, with x in int8: exact integer sums of each block, then scales."""
    numbers = 2 if fmt == "q4_1" else 1
    blocks = stored.reshape(stored.shape[0], -1, row_bytes(fmt, 32))
    d = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float64)[:, :, 0]
    codes = blocks[:, :, 2 * numbers :]
    if fmt == "q8_0":
        weights = codes.view(np.int8).astype(np.int64)
    else:
        weights = np.concatenate([codes & 15, codes >> 4], axis=2).astype(np.int64) - (8 if fmt == "q4_0" else 0)
    out = np.zeros((x.shape[0], stored.shape[0]))
    for block in range(blocks.shape[1]):
        cut = np.zeros((x.shape[0], 32), np.float32)
        part = x[:, block * 32 : (block + 1) * 32]
        cut[:, : part.shape[1]] = part
        largest = np.abs(cut).max(axis=1, keepdims=True)
        scale = (largest / np.float32(127)).astype(np.float64)
        q = np.rint(cut * (np.float32(127) / largest)).astype(np.int64)
        out += scale * d[:, block] * (q @ weights[:, block].T)
        if fmt == "q4_1":
            m = np.ascontiguousarray(blocks[:, block, 2:4]).view(np.float16).astype(np.float64)[:, 0]
            out += scale * m * q.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("fmt", ["f32", "bf16", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (1, 1), (16, 96), (33, 129)])
def test_linear(random: np.random.Generator, positions: int, fmt: str, bias: bool, rows: int, columns: int) -> None:
    x, stored = normal(random, positions, columns), encode(normal(random, rows, columns), fmt)
    matrix, numbers = pack(stored, fmt, columns), decode(stored, fmt, columns).astype(np.float64)
    b = normal(random, rows) if bias else np.zeros(rows, np.float32)
    exact = x.astype(np.float64) @ numbers.T + b
    if fmt == "f32":
        rounded = exact
    elif fmt == "bf16":
        rounded = torch.from_numpy(x).to(torch.bfloat16).double().numpy() @ numbers.T + b
    else:
        rounded = product_as_specified(x, stored, fmt, columns) + b
    for backend, expected in ((TWIN, rounded), (TORCH, exact)):
        found = backend.linear(x, matrix, b if bias else None)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=backend.name)
    if fmt != "f32" and rows > 20:
        assert np.abs(rounded - exact).max() > 1e-3, "nothing was rounded: the test shows nothing"


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_linear_of_a_large_matrix_goes_in_runs(random: np.random.Generator, fmt: str) -> None:
    x, stored = normal(random, 2, 1024), np.resize(encode(normal(random, 250, 1024), fmt), (5000, row_bytes(fmt, 1024)))
    expected = x @ decode(stored, fmt, 1024).T
    for backend in (TWIN, TORCH):
        found = backend.linear(x, pack(stored, fmt, 1024))
        assert np.abs(found - expected).max() < (2e-3 if fmt in ("f32", "f16") or backend is TORCH else 1.5)


@pytest.mark.parametrize("fmt", EVERY_QUANTIZED)
@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf")])
def test_a_position_that_is_not_finite_stays_so(random: np.random.Generator, fmt: str, hostile: float) -> None:
    x, weight = normal(random, 3, 70), pack(encode(normal(random, 20, 70), fmt), fmt, 70)
    expected = TWIN.linear(x, weight)
    x[1, 66] = hostile
    found = TWIN.linear(x, weight)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def test_activations_of_zeros_and_of_next_to_nothing() -> None:
    x = np.zeros((3, 64), np.float32)
    x[1, 5], x[2, 40] = 1e-31, 3e-30
    found = rounded_activations(x, "q8_0")
    assert not found[:2].any()
    np.testing.assert_allclose(found[2], x[2], rtol=1e-6)


def test_rms_norm(random: np.random.Generator) -> None:
    x, weight = normal(random, 3, 2, 20) * 5, normal(random, 20)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (20,), torch.from_numpy(weight), 1e-3).numpy()
    for backend in (TWIN, TORCH):
        np.testing.assert_allclose(backend.rms_norm(x, weight, 1e-3), expected, atol=1e-5)


def test_rope_turns_pairs_by_their_angle(random: np.random.Generator) -> None:
    x, angle = normal(random, 4, 3, 10), normal(random, 4, 5)
    pairs = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angle)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    for backend in (TWIN, TORCH):
        np.testing.assert_allclose(backend.rope(x, np.cos(angle), np.sin(angle)), expected, atol=1e-5)


def test_rope_leaves_what_is_not_rotated(random: np.random.Generator) -> None:
    x, angle = normal(random, 4, 3, 10), normal(random, 4, 3)
    for backend in BACKENDS:
        found = backend.rope(x, np.cos(angle), np.sin(angle))
        np.testing.assert_array_equal(found[..., 6:], x[..., 6:])
        whole = backend.rope(np.ascontiguousarray(x[..., :6]), np.cos(angle), np.sin(angle))
        np.testing.assert_array_equal(found[..., :6], whole)


def test_fixed_rms_norm_is_the_same_bits_everywhere(random: np.random.Generator) -> None:
    """The order of its sum, as it is specified, number by number; and torch's own norm."""
    for size in (1, 15, 16, 33, 640):
        x, weight = normal(random, 3, size) * 7, normal(random, size)
        expected = np.empty_like(x)
        for row, numbers in enumerate(x.astype(float)):
            lanes = [0.0] * 16
            for place, number in enumerate(numbers.tolist()):
                lanes[place % 16] += number * number
            for half in (8, 4, 2, 1):
                lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
            inverse = 1 / math.sqrt(lanes[0] / size + 1e-5)
            expected[row] = [
                np.float32(a * inverse * b)
                for a, b in zip(numbers.tolist(), weight.astype(float).tolist(), strict=True)
            ]
        for backend in BACKENDS:
            np.testing.assert_array_equal(backend.fixed_rms_norm(x, weight, 1e-5), expected)
        theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (size,), torch.from_numpy(weight), 1e-5).numpy()
        np.testing.assert_allclose(expected, theirs, rtol=1e-5, atol=1e-6)


def test_attention_with_a_scale_and_a_soft_cap(random: np.random.Generator) -> None:
    q, (k, v) = 3 * normal(random, 5, 2, 8), normal(random, 2, 2, 9, 8)
    scores = np.einsum("nhd,hkd->hnk", q, k).astype(float) * 0.7
    for softcap in (0.0, 2.0):
        capped = softcap * np.tanh(scores / softcap) if softcap else scores
        capped = np.where(np.arange(9)[None] <= 4 + np.arange(5)[:, None], capped, -np.inf)
        weights = np.exp(capped - capped.max(axis=-1, keepdims=True))
        expected = np.einsum("hnk,hkd->nhd", weights / weights.sum(axis=-1, keepdims=True), v)
        for backend in BACKENDS:
            found = backend.attention(q, *one(k, v, 4), (0, 1), AttentionSpec(0.7, softcap))
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=f"{backend.name} {softcap}")


@pytest.mark.parametrize("q_to_kv", [(0, 1, 2), (1, 2), (0, 0, 1, 2, 2), (2,), (1, 1)])
@pytest.mark.parametrize(("start", "positions"), [(0, 6), (5, 1), (3, 4)])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_attention(
    random, q_to_kv: tuple[int, ...], start: int, positions: int, window: int, dtype: type[np.floating]
) -> None:
    q = normal(random, positions, len(q_to_kv), 8)
    k, v = normal(random, 2, 3, start + positions, 8).astype(dtype)
    expected = np.empty_like(q)
    for n in range(positions):
        last = start + n
        first = max(0, last - window + 1) if window else 0
        for head, kv in enumerate(q_to_kv):
            scores = k[kv, first : last + 1].astype(float) @ q[n, head] / np.sqrt(8)
            weights = np.exp(scores - scores.max())
            expected[n, head] = weights / weights.sum() @ v[kv, first : last + 1].astype(float)
    for backend in (TWIN, TORCH):
        found = backend.attention(q, *one(k, v, start), q_to_kv, AttentionSpec(8**-0.5, window=window))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=backend.name)


@pytest.mark.parametrize(("start", "positions"), [(0, 1), (30, 1), (0, 7), (5, 20)])
def test_attention_sinks_as_in_transformers(random: np.random.Generator, start: int, positions: int) -> None:
    """GptOss: a score a head that takes its part of the softmax, and gives no value."""
    heads, stop = 6, start + positions
    q, sinks = 2 * normal(random, positions, heads, 16), 3 * normal(random, heads)
    k, v = normal(random, 2, 2, stop, 16)
    module = torch.nn.Module()
    module.num_key_value_groups, module.training, module.sinks = 3, False, torch.from_numpy(sinks)
    keys, position = torch.arange(stop)[None], start + torch.arange(positions)[:, None]
    for window in (0, 4):
        mask = torch.where((keys <= position) & ((keys > position - window) | (window == 0)), 0.0, -torch.inf)
        queries, k_all, v_all = (torch.from_numpy(of)[None] for of in (q.transpose(1, 0, 2), k, v))
        expected, _ = eager_attention_forward(module, queries, k_all, v_all, mask, 0.25)
        for backend in BACKENDS:
            found = backend.attention(q, *one(k, v, start), (0, 0, 0, 1, 1, 1), AttentionSpec(0.25, 0.0, window), sinks)
            np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-5, err_msg=backend.name)


def test_clamped_swiglu_as_in_transformers(random: np.random.Generator) -> None:
    gate, up = 8 * normal(random, 3, 65), 8 * normal(random, 3, 65)
    gate[0, :5], up[0, :5] = [-1e20, -200, 7, 200, 1e20], [7, -200, 200, -1e20, 1e20]
    both = torch.from_numpy(np.stack([gate, up], axis=-1).reshape(3, -1))  # gate and up are interleaved there
    experts = types.SimpleNamespace(limit=7.0, alpha=1.702)
    expected = GptOssExperts._apply_gate(experts, both).numpy()
    for backend in BACKENDS:
        found = backend.clamped_swiglu(gate, up, 7.0)
        np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-6, err_msg=backend.name)


def test_swiglu_also_far_from_zero() -> None:
    gate = np.array([[-200, -3, 0, 3, 200]], np.float32)
    up = np.full_like(gate, 2)
    expected = (torch.nn.functional.silu(torch.from_numpy(gate)) * 2).numpy()
    for backend in (TWIN, TORCH):
        np.testing.assert_allclose(backend.swiglu(gate, up), expected, atol=1e-6)


def test_geglu_also_far_from_zero() -> None:
    gate = np.array([[-1e20, -200, -3, -0.1, 0, 0.5, 3, 200, 1e20]], np.float32)
    up = np.full_like(gate, 2)
    expected = (torch.nn.functional.gelu(torch.from_numpy(gate), approximate="tanh") * 2).numpy()
    for backend in BACKENDS:
        np.testing.assert_allclose(backend.geglu(gate, up), expected, rtol=1e-5, atol=1e-6)
