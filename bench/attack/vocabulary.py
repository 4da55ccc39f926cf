"""Tokens from the vectors after layer k: each is compared with those that the public model gives for the whole vocabulary.

A layer looks only backwards, so the vector at a position depends on the tokens up to there. Those before are known, being
found one by one: what is left is to try every token at this position. The likeliest are tried first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.attack.public import PublicModel
from tpimpi.compute.arrays import F32

TRIED_FIRST = 256  # by what the model expects next, and as many by how near their rows are
TRIED_AT_ONCE = 2048
MOST_DISTANCE = 0.1  # of a vector from that of its token, against its length: of rounding; others are farther by far


def _load(path: Path) -> Any:
    """The model as transformers has it, f32."""
    import torch
    from transformers import AutoModelForCausalLM

    place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if place else path
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
    return model.eval()


class Vocabulary:
    """The public model up to layer k. Memory: the model in f32, twice its first layers."""

    def __init__(self, model: PublicModel, layers: int) -> None:
        import torch

        self._whole = _load(model.path)
        self._first = copy.deepcopy(self._whole.model)
        self._first.layers = self._first.layers[:layers]
        self._first.norm = torch.nn.Identity()
        self._table = model.table

    def tokens(self, vectors: F32) -> list[int]:
        """The tokens of a conversation from its `vectors` after layer k, [n, hidden], of positions from 0 on.

        Ends at the first position where no token comes near.
        """
        import torch
        from transformers import DynamicCache

        found: list[int] = []
        prefix, whole = DynamicCache(), DynamicCache()
        with torch.inference_mode(), np.errstate(all="ignore"):
            expected = None
            for vector in vectors:
                token = self._token(vector, prefix, expected) if np.isfinite(vector).all() else None
                if token is None:
                    return found
                found.append(token)
                ids = torch.tensor([[token]])
                self._first(ids, past_key_values=prefix, use_cache=True)
                expected = self._whole(ids, past_key_values=whole, use_cache=True).logits[0, -1].numpy()
        return found

    def _token(self, vector: F32, prefix: Any, expected: F32 | None) -> int | None:
        near = (self._table @ vector) / np.maximum(np.linalg.norm(self._table, axis=1), 1e-30)
        first = set(np.argsort(-near)[:TRIED_FIRST].tolist())
        if expected is not None:
            first |= set(np.argsort(-expected)[:TRIED_FIRST].tolist())
        least = MOST_DISTANCE * float(np.linalg.norm(vector))
        best = self._best(vector, prefix, first)
        if best[0] > least:
            best = min(best, self._best(vector, prefix, set(range(len(self._table))) - first))
        return best[1] if best[0] <= least else None

    def _best(self, vector: F32, prefix: Any, tokens: Iterable[int]) -> tuple[float, int]:
        """The token whose vector is nearest, after its distance."""
        import torch

        best, left = (float("inf"), -1), sorted(tokens)
        for start in range(0, len(left), TRIED_AT_ONCE):
            some = left[start : start + TRIED_AT_ONCE]
            past = copy.deepcopy(prefix)
            if past.get_seq_length():
                past.batch_repeat_interleave(len(some))
            out = self._first(torch.tensor(some)[:, None], past_key_values=past, use_cache=True).last_hidden_state
            distances = np.linalg.norm(out[:, -1].numpy() - vector, axis=1)
            best = min(best, (float(distances.min()), some[int(distances.argmin())]))
        return best
