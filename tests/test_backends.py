"""Each backend against the NumPy twin, and the twin against torch's own functions where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tpimpi.backends import load_backend
from tpimpi.formats import decode, encode

TWIN, TORCH = load_backend("numpy", 1), load_backend("torch", 1)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("fmt", ["f32", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(random: np.random.Generator, positions: int, fmt: str, bias: bool) -> None:
    x, weight = normal(random, positions, 40), encode(normal(random, 24, 40), fmt)
    b = normal(random, 24) if bias else None
    expected = x.astype(np.float64) @ decode(weight).astype(np.float64).T + (0 if b is None else b)
    for backend in (TWIN, TORCH):
        np.testing.assert_allclose(backend.linear(x, weight, b), expected, atol=1e-4)


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


@pytest.mark.parametrize("q_to_kv", [(0, 1, 2), (1, 2), (0, 0, 1, 2, 2), (2,), (1, 1)])
@pytest.mark.parametrize(("start", "positions"), [(0, 6), (5, 1), (3, 4)])
@pytest.mark.parametrize("window", [0, 3])
def test_attention(random, q_to_kv: tuple[int, ...], start: int, positions: int, window: int) -> None:
    q = normal(random, positions, len(q_to_kv), 8)
    k, v = normal(random, 3, start + positions, 8), normal(random, 3, start + positions, 8)
    expected = np.empty_like(q)
    for n in range(positions):
        last = start + n
        first = max(0, last - window + 1) if window else 0
        for head, kv in enumerate(q_to_kv):
            scores = k[kv, first : last + 1] @ q[n, head] / np.sqrt(8)
            weights = np.exp(scores - scores.max())
            expected[n, head] = weights / weights.sum() @ v[kv, first : last + 1]
    for backend in (TWIN, TORCH):
        found = backend.attention(q, k, v, q_to_kv, start, window)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=backend.name)


def test_swiglu_also_far_from_zero() -> None:
    gate = np.array([[-200, -3, 0, 3, 200]], np.float32)
    up = np.full_like(gate, 2)
    expected = (torch.nn.functional.silu(torch.from_numpy(gate)) * 2).numpy()
    for backend in (TWIN, TORCH):
        np.testing.assert_allclose(backend.swiglu(gate, up), expected, atol=1e-6)


def test_bf16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    special = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001], np.uint32)
    values = np.concatenate([bits, special]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    found = torch.from_numpy(encode(values, "bf16").view(np.int16)).view(torch.bfloat16)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    assert torch.equal(found[~nan], expected[~nan])
    np.testing.assert_array_equal(decode(encode(values, "bf16"))[~nan.numpy()], expected[~nan].float().numpy())
