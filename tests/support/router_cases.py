"""Routers to choose by: vectors at random, near ties and exact ones, and the cases of the kernels' test program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.support.kernel_cases import CLAMPED_SWIGLU, EPS, ROUTE, TWIN, Case, same_bits, within
from tpimpi.compute.backends.routing import route
from tpimpi.compute.formats.bf16 import from_bf16, to_bf16
from tpimpi.compute.router import ROUTER_BIASES, SCORINGS, RouterSpec

# Each kind once: scoring, normalized, what the bias is of; and scales.
SPECS = [
    RouterSpec(experts, chosen, scoring, normalized, scale, bias)
    for experts, chosen, scale in ((32, 4, 1.0), (9, 3, 2.5))
    for scoring in SCORINGS
    for normalized in (True, False)
    for bias in ROUTER_BIASES
]


@dataclass(frozen=True)
class Routed:
    """A router's arrays, and vectors for it."""

    spec: RouterSpec
    x: np.ndarray  # f32 [n, hidden]
    router: np.ndarray  # [experts, hidden], f32 or bf16 as uint16
    bias: np.ndarray | None  # f32 [experts]


def routed(random: np.random.Generator, spec: RouterSpec, n: int, hidden: int, bf16: bool) -> Routed:
    """A quarter of the experts are equal to another to the bit, or differ from it in one last place of one weight."""
    x = random.standard_normal((n, hidden), dtype=np.float32)
    router = random.standard_normal((spec.experts, hidden), dtype=np.float32)
    bias = None if spec.bias == "none" else random.standard_normal(spec.experts, dtype=np.float32)
    router = to_bf16(router) if bf16 else router
    for copy in range(spec.experts // 4):
        router[-1 - copy] = router[copy]
        if copy % 2:
            router.view(np.uint16 if bf16 else np.uint32)[-1 - copy, random.integers(hidden)] ^= 1
        if bias is not None:
            bias[-1 - copy] = bias[copy]
    return Routed(spec, x, router, bias)


def numbers(router: np.ndarray) -> np.ndarray:
    """A router's numbers, f32."""
    return router if router.dtype == np.float32 else from_bf16(router)


def every_kind(random: np.random.Generator, n: int) -> Iterator[Routed]:
    """Every kind of router in both dtypes, at hidden sizes that do and do not fill whole lanes."""
    for number, spec in enumerate(SPECS):
        for bf16 in (False, True):
            yield routed(random, spec, n, (64, 33, 16, 7, 200)[number % 5], bf16)


def route_cases(random: np.random.Generator) -> list[Case]:
    """The bits of the twin at every level: the experts, and their weights behind them."""
    cases = []
    for number, r in enumerate([*every_kind(random, 11), routed(random, RouterSpec(128, 8, *_QWEN3), 5, 2880, True)]):
        cases.append(route_case(r, 1 + number % 3))
        if number % 8 == 0:
            bad = r.x.copy()
            bad[-1, 3] = np.nan if number % 16 else np.inf
            cases.append(route_case(Routed(r.spec, bad, r.router, r.bias), 1))
    for spec, bf16 in ((RouterSpec(16, 2, *_QWEN3), True), (RouterSpec(16, 3, "sigmoid", True, 1.0, "choice"), False)):
        cases.append(route_case(routed(random, spec, 50_000, 32, bf16), 1))
    return cases


_QWEN3 = ("softmax", True, 1.0, "none")


def route_case(r: Routed, parts: int) -> Case:
    """One call of the kernels; -1 everywhere is what the program gives where logits are not finite."""
    spec, n = r.spec, len(r.x)
    try:
        experts, weights = route(r.x, r.router, r.bias, spec)
        expected = np.concatenate([experts.ravel(), weights.ravel().view(np.int32)])
    except ValueError:
        expected = np.full(2 * n * spec.top_k, -1, np.int32)
    bf16, sigmoid = r.router.dtype == np.uint16, spec.scoring == "sigmoid"
    parameters = [n, r.x.shape[1], spec.experts, spec.top_k, int(bf16), int(sigmoid), int(spec.normalized)]
    parameters += [ROUTER_BIASES.index(spec.bias), parts]
    arrays = [r.x, r.router, np.zeros(0, np.float32) if r.bias is None else r.bias, np.float64(spec.scale)]
    name = f"route {spec} hidden={r.x.shape[1]} bf16={bf16}"
    return Case(name, ROUTE, parameters, arrays, expected.shape, same_bits(expected), np.dtype(np.int32))


def clamped_swiglu_cases(random: np.random.Generator) -> list[Case]:
    hostile = np.array([-np.inf, np.inf, np.nan, -0.0, 0, -200, 200, -3e38, 3e38, 7, -7, 6.9999995, 1e-40], np.float32)
    wide = np.concatenate([hostile, np.linspace(-70, 12, 20001, dtype=np.float32), random.normal(0, 4, 999)])
    cases = []
    for alias, gate in enumerate([wide.astype(np.float32), wide[:7].astype(np.float32), wide[-33:].astype(np.float32)]):
        up = 6 * random.standard_normal(gate.size, dtype=np.float32)
        up[: len(hostile)] = hostile[::-1][: len(up)]
        with np.errstate(invalid="ignore", over="ignore"):
            g = np.minimum(gate.astype(np.float64), 7)
            u = np.clip(up.astype(np.float64), -7, 7)
            exact = g / (1 + np.exp(-1.702 * g)) * (u + 1)
            expected = np.where(np.isfinite(gate), exact, TWIN.clamped_swiglu(gate, up, 7.0)).astype(np.float32)
            # An error of what e is raised to, in last places, is as large a one of the power; one of u is not of u + 1.
            sizes = np.abs(expected.astype(np.float64)) * (8 + 4 * np.abs(np.clip(g, -110, 7)))
            tolerance = np.nan_to_num(EPS * (sizes + np.abs(g / (1 + np.exp(-1.702 * g))))) + 1e-35
        check = within(expected, tolerance)
        arrays = [gate, up, np.float32(7)]
        cases.append(Case(f"clamped_swiglu {gate.size}", CLAMPED_SWIGLU, [gate.size, alias], arrays, gate.shape, check))
    return cases
