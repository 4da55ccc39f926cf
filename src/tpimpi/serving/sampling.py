"""From the logits of one position to the next token id: greedy, or drawn from the filtered distribution.

The options and their order are those of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p.
OpenAI's penalties and bias, which are added to logits, come after the repetition penalty.
A sampler is a function; everything it knows is in its closure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tpimpi.errors import ModelError

Floats = npt.NDArray[np.floating[Any]]
Sampler = Callable[[Floats, Sequence[int]], int]
GREATEST_PENALTY, GREATEST_BIAS = 2.0, 100.0  # on either side of 0, as in OpenAI's API


@dataclass(frozen=True)
class Additions:
    """What is added to logits, as OpenAI's API has it: `bias` by id; and of each id that the answer has, `presence` is taken
    off once, `frequency` as often as it stands there. The answer begins at `start` of the history."""

    frequency: float = 0.0
    presence: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    start: int = 0

    def __bool__(self) -> bool:
        return bool(self.frequency or self.presence or self.bias)


NO_ADDITIONS = Additions()


def make_sampler(
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    drawn: int = 0,
    additions: Additions = NO_ADDITIONS,
) -> Sampler:
    """A function from logits (float32 [vocab]) and history (ids of prompt and answer so far) to the next id.

    Temperature 0 is greedy: the largest logit, the lowest id among equals. The other defaults mean "off". The same
    seed gives the same draws, of which the first `drawn` are left out: a sampler that made so many tokens before goes on
    as it would have. None takes a seed from the system. The logits are not changed.

    Raises ValueError, in one line, for an option out of its range. The function raises ValueError for logits with
    NaN or +inf, or with nothing finite.
    """
    _check(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_additions(additions)
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise ValueError(f"seed is {seed}, must be a whole number, 0 or more")
    if temperature == 0:  # without numpy.random, which takes 6 MB

        def greedy(logits: Floats, history: Sequence[int]) -> int:
            return int(_penalized(logits, history, repetition_penalty, additions).argmax())

        return greedy
    bits = np.random.PCG64(seed)
    bits.advance(drawn)  # a draw takes one number of the generator
    rng = np.random.Generator(bits)

    def sample(logits: Floats, history: Sequence[int]) -> int:
        scores = _penalized(logits, history, repetition_penalty, additions)
        ids, weights = _filtered(scores, temperature, top_k, top_p, min_p)
        total = weights.cumsum(out=weights)
        # side="right" never lands on a weight of 0; the clip is for a product that rounds up to the total
        drawn = min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), len(total) - 1)
        return drawn if ids is None else int(ids[drawn])

    return sample


class SamplingError(ValueError):
    """No token can be chosen, for this answer alone; one line."""


def failing_alone(sample: Sampler) -> Sampler:
    """The same sampler, which says of logits that it cannot use that this answer ends: SamplingError."""

    def checked(logits: Floats, history: Sequence[int]) -> int:
        try:
            return sample(logits, history)
        except SamplingError:
            raise
        except ValueError as error:
            raise SamplingError(f"no token can be chosen: {error}, or the sampling options are extreme") from error

    return checked


def naming_the_model(sample: Sampler) -> Sampler:
    """The same sampler, which says of logits that cannot be used that the model is to blame: ModelError."""

    def checked(logits: Floats, history: Sequence[int]) -> int:
        try:
            return sample(logits, history)
        except ValueError as error:
            raise ModelError(f"no token can be chosen: {error}; check the model, or the sampling options") from error

    return checked


def distribution(
    logits: Floats,
    history: Sequence[int],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    additions: Additions = NO_ADDITIONS,
) -> npt.NDArray[np.float64]:
    """What a sampler with these options draws from: probabilities, float64 [vocab]. Raises as `make_sampler`."""
    _check(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_additions(additions)
    scores = _penalized(logits, history, repetition_penalty, additions)
    probabilities = np.zeros(scores.shape, np.float64)
    if temperature == 0:
        probabilities[scores.argmax()] = 1.0
    else:
        ids, weights = _filtered(scores, temperature, top_k, top_p, min_p)
        probabilities[slice(None) if ids is None else ids] = weights / weights.sum()
    return probabilities


def _check(temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> None:
    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not (number(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, must be 0 or more (0 is greedy)")
    if not (number(top_k) and isinstance(top_k, int) and top_k >= 0):
        raise ValueError(f"top-k is {top_k}, must be a whole number, 0 or more (0 is off)")
    if not (number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top-p is {top_p}, must be above 0 and at most 1 (1 is off)")
    if not (number(min_p) and 0 <= min_p <= 1):
        raise ValueError(f"min-p is {min_p}, must be from 0 to 1 (0 is off)")
    if not (number(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(f"repetition-penalty is {repetition_penalty}, must be above 0 (1 is off)")


def _check_additions(additions: Additions) -> None:
    for name, value in (("frequency-penalty", additions.frequency), ("presence-penalty", additions.presence)):
        if not abs(value) <= GREATEST_PENALTY:
            raise ValueError(
                f"{name} is {value}, must be from {-GREATEST_PENALTY:g} to {GREATEST_PENALTY:g} (0 is off)"
            )
    for token, value in additions.bias.items():
        if not (token >= 0 and abs(value) <= GREATEST_BIAS):
            raise ValueError(
                f"logit-bias of {token} is {value}, must be from {-GREATEST_BIAS:g} to {GREATEST_BIAS:g}, of a token id"
            )


def _add(scores: npt.NDArray[np.float64], history: Sequence[int], additions: Additions) -> None:
    """Add what is to be added, in place; ids that there is no score for are left out."""
    if additions.frequency or additions.presence:
        ids, counts = np.unique(np.asarray(history[additions.start :], np.int64), return_counts=True)
        known = (ids >= 0) & (ids < len(scores))
        scores[ids[known]] -= additions.presence + additions.frequency * counts[known]
    for token, value in additions.bias.items():
        if token < len(scores):
            scores[token] += value


def _penalized(logits: Floats, history: Sequence[int], penalty: float, additions: Additions) -> Floats:
    """Scores [vocab]: the logits, or a float64 copy with every id of the history made less likely, once, and with what is
    added."""
    scores = logits
    if penalty != 1 and len(history) > 0:
        scores = logits.astype(np.float64)
        seen = np.unique(np.asarray(history, np.int64))
        seen = seen[(seen >= 0) & (seen < len(scores))]  # a prompt may hold ids that the head has no row for
        with np.errstate(over="ignore", invalid="ignore"):
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if additions:
        raised = scores.astype(np.float64)
        _add(raised, history, additions)
        scores = raised
    best = float(scores.max())  # NaN if any is
    if not math.isfinite(best):
        raise ValueError(f"the largest logit is {best}, must be finite: the model or its weights are broken")
    return scores


def _filtered(
    scores: Floats, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.intp] | None, npt.NDArray[np.float64]]:
    """The ids that are left, ascending, and their weights, the largest 1: (int [left], float64 [left]); None: all ids."""
    ids: npt.NDArray[np.intp] | None = None
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature only makes the weights 0
        # In place: passes over a large vocabulary cost as much as the exponentials.
        weights = scores.astype(np.float64)
        weights -= float(scores.max())
        weights /= temperature
        if 0 < top_k < len(weights):
            ids = np.flatnonzero(weights >= np.partition(weights, -top_k)[-top_k])
            weights = weights[ids]
        np.exp(weights, out=weights)
    if top_p < 1:
        ids, weights = _kept(ids, weights, _nucleus(weights, top_p * weights.sum()))
    if min_p > 0:
        ids, weights = _kept(ids, weights, np.flatnonzero(weights >= min_p))
    return ids, weights


def _kept(
    ids: npt.NDArray[np.intp] | None, weights: npt.NDArray[np.float64], kept: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The ids and weights at these places."""
    return kept if ids is None else ids[kept], weights[kept]


def _nucleus(weights: npt.NDArray[np.float64], mass: float) -> npt.NDArray[np.intp]:
    """Positions, ascending, of the fewest largest weights that add up to `mass`; the first ones among equals."""
    size = 1024
    while True:  # a sort of the whole vocabulary is seldom needed
        size = min(size, len(weights))
        largest = np.sort(np.partition(weights, -size)[-size:])[::-1]
        total = largest.cumsum()
        if total[-1] >= mass or size == len(weights):
            break
        size *= 16
    count = min(int(np.searchsorted(total, mass, side="left")) + 1, size)
    cut = largest[count - 1]
    above, equal = np.flatnonzero(weights > cut), np.flatnonzero(weights == cut)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
