"""The router: the same bits in every backend and at every level, and the mathematics of torch's softmax and topk."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support.router_cases import Routed, every_kind, numbers, routed
from tpimpi.compute.backends import Backend, has_native, load_backend
from tpimpi.compute.backends.routing import fixed_exp, router_logits
from tpimpi.compute.router import RouterSpec


def _native_backends() -> list[Backend]:
    if not has_native():
        return []
    from tpimpi._native import levels

    return [load_backend("native", threads, level) for level in levels() for threads in (1, 3)]


TWIN = load_backend("numpy", 1)
BACKENDS = [load_backend("torch", 1), *_native_backends()]


def assert_same_everywhere(r: Routed) -> tuple[np.ndarray, np.ndarray]:
    """Every backend gives the bits of the twin, which are returned."""
    experts, weights = TWIN.route(r.x, r.router, r.bias, r.spec)
    assert experts.dtype == np.int32 and weights.dtype == np.float32
    assert experts.shape == weights.shape == (len(r.x), r.spec.top_k)
    for backend in BACKENDS:
        found = backend.route(r.x, r.router, r.bias, r.spec)
        np.testing.assert_array_equal(found[0], experts, err_msg=backend.name)
        np.testing.assert_array_equal(found[1].view(np.uint32), weights.view(np.uint32), err_msg=backend.name)
    return experts, weights


def as_torch(r: Routed) -> tuple[np.ndarray, np.ndarray]:
    """The scores that are chosen by, f64 [n, experts], and the weight of each expert before it is normalized."""
    logits = torch.from_numpy(r.x).double() @ torch.from_numpy(numbers(r.router)).double().T
    bias = torch.zeros(r.spec.experts) if r.bias is None else torch.from_numpy(r.bias)
    if r.spec.bias == "logits":
        logits = logits + bias
    scores = torch.softmax(logits, dim=1) if r.spec.scoring == "softmax" else torch.sigmoid(logits)
    return (scores + bias if r.spec.bias == "choice" else scores).numpy(), scores.numpy()


def test_every_kind_of_router_is_the_same_everywhere_and_as_in_torch() -> None:
    for r in every_kind(np.random.default_rng(3), 40):
        experts, weights = assert_same_everywhere(r)
        order, scores = as_torch(r)
        best = np.sort(order, axis=1)[:, ::-1][:, : r.spec.top_k]
        np.testing.assert_allclose(np.take_along_axis(order, experts, 1), best, rtol=1e-12, err_msg=str(r.spec))
        expected = np.take_along_axis(scores, experts, 1)
        if r.spec.normalized:
            expected = expected / expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights, expected * r.spec.scale, atol=1e-6, err_msg=str(r.spec))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_hundred_thousand_vectors_choose_the_same_experts(bf16: bool) -> None:
    random = np.random.default_rng(5)
    spec = RouterSpec(32, 4, "softmax", True, 1.0, "none")
    ties = 0
    for _ in range(10):
        r = routed(random, spec, 5000, 64, bf16)
        experts, _ = assert_same_everywhere(r)
        logits = np.take_along_axis(router_logits(r.x, r.router), experts, 1)
        ties += int((np.diff(logits, axis=1) == 0).sum())
    assert ties > 1000, "there were no ties: the test shows nothing of them"


def test_of_equal_experts_the_lower_index_is_chosen() -> None:
    for scoring in ("softmax", "sigmoid"):
        for bias in ("none", "choice"):
            x, router = np.ones((3, 20), np.float32), np.ones((40, 20), np.float32)
            router[7] = router[31] = 2
            spec = RouterSpec(40, 5, scoring, True, 1.0, bias)
            r = Routed(spec, x, router, np.zeros(40, np.float32) if bias == "choice" else None)
            experts, _ = assert_same_everywhere(r)
            np.testing.assert_array_equal(experts, [[7, 31, 0, 1, 2]] * 3)


def test_the_sum_of_logits_is_in_the_order_that_is_specified() -> None:
    random = np.random.default_rng(1)
    for size in (1, 15, 16, 33, 640):
        x, router = (random.standard_normal((n, size), dtype=np.float32) for n in (2, 3))
        found = router_logits(x, router)
        for p, e in np.ndindex(found.shape):
            lanes = [0.0] * 16
            for i in range(size):
                lanes[i % 16] += float(x[p, i]) * float(router[e, i])
            for half in (8, 4, 2, 1):
                lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
            assert found[p, e] == lanes[0]


def test_fixed_exp_is_within_two_last_places() -> None:
    x = -np.concatenate([np.linspace(0, 708, 4001), np.geomspace(1e-300, 700, 500), [0.0, -0.0]])
    found = fixed_exp(x)
    for at, power in zip(x.tolist(), found.tolist(), strict=True):
        assert abs(power - math.exp(at)) <= 2 * math.ulp(math.exp(at)), at
    np.testing.assert_array_equal(fixed_exp(np.array([-708.1, -1e9, -1e308])), 0)
    assert Fraction(float(fixed_exp(np.array([0.0]))[0])) == 1


def test_scores_that_all_vanish_have_no_nan() -> None:
    """Sigmoids of very negative logits are zero; a bias of the choice can choose those whose softmax is zero."""
    x = np.full((1, 16), 100, np.float32)
    for scoring in ("sigmoid", "softmax"):
        router = np.full((6, 16), -1, np.float32)
        router[5] = 1
        bias = np.array([3, 4, 5, 0, 0, -9], np.float32)
        r = Routed(RouterSpec(6, 2, scoring, True, 1.0, "choice"), x, router, bias)
        experts, weights = assert_same_everywhere(r)
        np.testing.assert_array_equal(experts, [[2, 1]])
        np.testing.assert_array_equal(weights, [[0, 0]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    for kind in ("x", "router", "bias"):
        for of in ("logits", "choice"):
            r = routed(np.random.default_rng(2), RouterSpec(32, 4, "sigmoid", True, 1.0, of), 3, 40, False)
            assert r.bias is not None
            {"x": r.x, "router": r.router, "bias": r.bias}[kind].flat[7] = value
            for backend in (TWIN, *BACKENDS):
                with pytest.raises(ValueError, match="router logits are not finite"):
                    backend.route(r.x, r.router, r.bias, r.spec)
