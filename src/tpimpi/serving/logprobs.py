"""Log-probabilities of tokens, from the logits as the model gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpimpi.serving.sampling import Floats


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability in nats, and the likeliest tokens with theirs, the likeliest first."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


def logprob_of(logits: Floats, token: int, most: int) -> Logprob:
    """The log softmax of logits [vocab] at `token`, and at the `most` likeliest, in float64."""
    scores = logits.astype(np.float64)
    scores -= float(scores.max())
    scores -= np.log(np.exp(scores).sum())
    likeliest: list[int] = []
    if most > 0:
        few = np.argpartition(scores, -most)[-most:] if most < len(scores) else np.arange(len(scores))
        likeliest = few[np.argsort(-scores[few], kind="stable")].tolist()
    return Logprob(token, float(scores[token]), [(one, float(scores[one])) for one in likeliest])
