"""The experts of a block at once, against the plain sum, and against transformers' experts of gpt-oss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.formats import EVERY_FORMAT
from tpimpi.compute.backends import Backend, generic, has_native, load_backend
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats.packed import Matrix, encode, pack, values


def _native_backends() -> list[Backend]:
    if not has_native():
        return []
    from tpimpi._native import levels

    return [load_backend("native", threads, level) for level in levels() for threads in (1, 3)]


TWIN = load_backend("numpy", 1)
NATIVE = _native_backends()
BACKENDS = [TWIN, load_backend("torch", 1), *NATIVE]


def matrix(random: np.random.Generator, fmt: str, rows: int, columns: int) -> Matrix:
    return pack(encode(random.standard_normal((rows, columns), dtype=np.float32), fmt), fmt, columns)


def use(
    random: np.random.Generator, hidden: int, columns: int, n: int, formats: tuple[str, str], biases: bool
) -> ExpertUse:
    """An expert at random, which about half of n positions use; `formats` are gate's and up's, and down's."""
    rows = np.flatnonzero(random.random(n) < 0.6).astype(np.int32)
    matrices, parts = {}, {}
    if columns:
        matrices = {name: matrix(random, formats[0], columns, hidden) for name in ("gate", "up")}
        matrices["down"] = matrix(random, formats[1], hidden, columns)
    if biases:
        parts["down_bias"] = random.standard_normal(hidden, dtype=np.float32)
        if columns:
            parts |= {name: random.standard_normal(columns, dtype=np.float32) for name in ("gate_bias", "up_bias")}
    return ExpertUse(matrices, parts, rows, random.random(len(rows), dtype=np.float32))


def total(backend: Backend, x: np.ndarray, uses: list[ExpertUse], activation: str, limit: float = 0.0) -> np.ndarray:
    """The experts' sum alone."""
    out = np.zeros(x.shape, np.float32)
    backend.experts(x, uses, activation, limit, out)
    return out


def in_f64(x: np.ndarray, uses: list[ExpertUse], activation: str) -> np.ndarray:
    y = np.zeros(x.shape)
    for one in uses:
        result = np.zeros((len(one.rows), x.shape[1]))
        if one.matrices:
            w = {name: values(of).astype(np.float64) for name, of in one.matrices.items()}
            gate, up = (x[one.rows] @ w[name].T + one.parts.get(f"{name}_bias", 0) for name in ("gate", "up"))
            if activation == "clamped_silu":
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
            slope = 1.702 if activation == "clamped_silu" else 1
            with np.errstate(over="ignore"):
                gated = gate / (1 + np.exp(-slope * gate)) * up
            if activation == "gelu_tanh":
                gated = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
            result = gated @ w["down"].T
        result = result + one.parts.get("down_bias", 0)
        for place, row in enumerate(one.rows):
            y[row] += float(one.weights[place]) * result[place]
    return y


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_silu"])
@pytest.mark.parametrize("biases", [False, True])
def test_experts(activation: str, biases: bool) -> None:
    random = np.random.default_rng(4)
    for n, count in ((1, 4), (7, 5), (20, 3)):
        uses = [use(random, 40, columns, n, ("f32", "f32"), biases) for columns in (24, 33, 0, 16, 5)[:count]]
        x = random.standard_normal((n, 40), dtype=np.float32)
        expected = in_f64(x, uses, activation)
        assert np.abs(expected).max() > 1, "nothing was computed"
        for backend in BACKENDS:
            found = total(backend, x, uses, activation, 7.0)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3, err_msg=backend.name)


def test_experts_as_in_transformers() -> None:
    """gpt-oss: biases everywhere, gate and up interleaved, clamped."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    random = np.random.default_rng(8)
    hidden, columns, count, n = 48, 32, 6, 9
    config = GptOssConfig(hidden_size=hidden, intermediate_size=columns, num_local_experts=count)
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config)
    for parameter in theirs.parameters():
        parameter.data = torch.from_numpy(random.standard_normal(parameter.shape, dtype=np.float32))
    x = random.standard_normal((n, hidden), dtype=np.float32)
    chosen = np.argsort(random.random((n, count)), axis=1)[:, :3]
    weights = random.random((n, 3), dtype=np.float32)
    expected = theirs(torch.from_numpy(x), torch.from_numpy(chosen), torch.from_numpy(weights)).detach().numpy()

    def packed(of: torch.Tensor) -> Matrix:  # theirs are [columns, rows]
        array = np.ascontiguousarray(of.detach().numpy().T)
        return pack(encode(array, "f32"), "f32", array.shape[1])

    uses = []
    for expert in range(count):
        both, bias = theirs.gate_up_proj[expert], theirs.gate_up_proj_bias[expert].detach().numpy()
        rows, places = np.nonzero(chosen == expert)
        matrices = {"gate": packed(both[:, ::2]), "up": packed(both[:, 1::2]), "down": packed(theirs.down_proj[expert])}
        parts = {"gate_bias": bias[::2].copy(), "up_bias": bias[1::2].copy()}
        parts["down_bias"] = theirs.down_proj_bias[expert].detach().numpy()
        uses.append(ExpertUse(matrices, parts, rows.astype(np.int32), weights[rows, places]))
    for backend in BACKENDS:
        np.testing.assert_allclose(
            total(backend, x, uses, "clamped_silu", theirs.limit), expected, rtol=1e-4, atol=2e-3, err_msg=backend.name
        )


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_experts_are_to_the_bit_what_they_are_one_after_another(fmt: str) -> None:
    """At every level, with any number of threads, with few positions and many; and each position alone."""
    random = np.random.default_rng(6)
    for n, hidden, columns in ((1, 256, 320), (19, 64, 96)):
        down = "q8_0" if fmt.startswith("q4_0") else fmt
        uses = [use(random, hidden, columns, n, (fmt, down), True) for _ in range(3)]
        uses += [
            use(random, hidden, columns // 2, n, ("q4_0", "f32"), False),
            use(random, hidden, 0, n, ("", ""), True),
        ]
        x = random.standard_normal((n, hidden), dtype=np.float32)
        for backend in NATIVE:
            expected = random.standard_normal(x.shape, dtype=np.float32)
            together, in_calls = expected.copy(), expected.copy()
            generic.experts(backend, x, uses, "silu", 0.0, expected)
            backend.experts(x, uses, "silu", 0.0, together)
            np.testing.assert_array_equal(together, expected)
            backend.experts(x, uses[:2], "silu", 0.0, in_calls)
            backend.experts(x, uses[2:], "silu", 0.0, in_calls)
            np.testing.assert_array_equal(in_calls, expected)
            expected = total(backend, x, uses, "silu")
            for row in {0, n - 1}:
                own = [
                    ExpertUse(one.matrices, one.parts, np.zeros(1, np.int32), one.weights[one.rows == row])
                    for one in uses
                    if row in one.rows
                ]
                np.testing.assert_array_equal(total(backend, x[[row]], own, "silu")[0], expected[row])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_silu"])
def test_threads_share_experts_of_every_size(activation: str) -> None:
    """So many positions that several threads have work, and so many numbers that experts are taken in several runs."""
    random = np.random.default_rng(7)
    n, hidden = 300, 528
    x = random.standard_normal((n, hidden), dtype=np.float32)
    uses = [use(random, hidden, columns, n, (fmt, "q8_0"), True) for columns in (48, 300) for fmt in ("q4_0", "f32")]
    uses += [use(random, hidden, columns, n, ("bf16", "f16"), columns > 40) for columns in (0, 31, 0, 416, 17)]
    mixed = {**uses[0].matrices, "up": matrix(random, "q8_0", 48, hidden)}
    uses += [replace(uses[0], matrices=mixed), replace(uses[1], rows=uses[0].rows, weights=uses[0].weights)]
    uses += [replace(one, rows=np.arange(n, dtype=np.int32), weights=x[:, 0].copy()) for one in uses[:3]]
    for backend in NATIVE:
        expected = np.zeros_like(x)
        generic.experts(backend, x, uses, activation, 7.0, expected)
        np.testing.assert_array_equal(total(backend, x, uses, activation, 7.0), expected)


def test_what_does_not_fit_is_refused() -> None:
    if not NATIVE:
        pytest.skip("tpimpi was installed without its native kernels")
    random = np.random.default_rng(2)
    x, y = random.standard_normal((3, 32), dtype=np.float32), np.zeros((3, 32), np.float32)
    fits = use(random, 32, 16, 3, ("q8_0", "f32"), True)
    fits = replace(fits, rows=np.array([0, 2], np.int32), weights=np.ones(2, np.float32))
    short = Matrix("f32", 32, 16, fits.matrices["down"].data[:-1])
    for wrong, what in [
        (replace(fits, rows=np.array([0, 3], np.int32)), "position is not there"),
        (replace(fits, rows=np.array([0, -1], np.int32)), "position is not there"),
        (replace(fits, weights=np.ones(3, np.float32)), "another size"),
        (replace(fits, parts={"down_bias": np.ones(31, np.float32)}), "another size"),
        (replace(fits, parts={"gate_bias": np.ones(17, np.float32)}), "another size"),
        (replace(fits, matrices={**fits.matrices, "up": matrix(random, "q8_0", 17, 32)}), "do not fit"),
        (replace(fits, matrices={**fits.matrices, "gate": matrix(random, "q8_0", 16, 31)}), "do not fit"),
        (replace(fits, matrices={**fits.matrices, "down": matrix(random, "f32", 32, 17)}), "do not fit"),
        (replace(fits, matrices={**fits.matrices, "down": short}), "weights have another size"),
    ]:
        with pytest.raises(ValueError, match=what):
            NATIVE[0].experts(x, [fits, wrong], "silu", 0.0, y)
    with pytest.raises(ValueError, match="limit"):
        NATIVE[0].experts(x, [fits], "clamped_silu", 0.0, y)
    with pytest.raises(ValueError, match="shape of x"):
        NATIVE[0].experts(x, [fits], "silu", 0.0, y[:2])
    np.testing.assert_array_equal(y, 0)


def test_no_experts_and_no_positions() -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((3, 32), dtype=np.float32)
    nobody = use(random, 32, 16, 0, ("f32", "f32"), True)
    for backend in BACKENDS:
        np.testing.assert_array_equal(total(backend, x, [], "silu"), np.zeros_like(x))
        np.testing.assert_array_equal(total(backend, x, [nobody], "silu"), np.zeros_like(x))
        assert total(backend, x[:0], [nobody], "silu").shape == (0, 32)
