"""The next token from the last sum of each step: the residual after the last layer, the public norm and head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.attack.messages import Step, residual
from bench.attack.public import PublicModel


def next_tokens(steps: Sequence[Step], wire: str, model: PublicModel) -> list[int]:
    """After each step the likeliest token (what `--temperature 0` answers with); -1 where the numbers are none."""
    rows = [residual(step, wire, model, model.config.layers)[-1:] for step in steps]
    tokens = np.full(len(rows), -1)
    usable = [place for place, row in enumerate(rows) if len(row) and np.isfinite(row).all()]
    if usable:
        with np.errstate(all="ignore"):
            logits = model.logits(np.concatenate([rows[place] for place in usable]))
        logits = logits[:, : model.tokenizer.sampled_ids]
        tokens[usable] = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
    return [int(token) for token in tokens]
