"""The next token from the last sum of each step: the residual after the last layer, the public norm and head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.attack.messages import Step, residual
from bench.attack.public import PublicModel


def next_tokens(steps: Sequence[Step], wire: str, model: PublicModel) -> list[int]:
    """After each step the likeliest token (what `--temperature 0` answers with); -1 where the numbers are none."""
    tokens = []
    for step in steps:
        last = residual(step, wire, model, model.config.layers)[-1:]
        if not len(last) or not np.isfinite(last).all():
            tokens.append(-1)
            continue
        with np.errstate(all="ignore"):
            logits = model.logits(last)[0, : model.tokenizer.sampled_ids]
        tokens.append(int(logits.argmax()) if np.isfinite(logits).all() else -1)
    return tokens
