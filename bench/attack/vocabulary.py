"""Tokens from the vectors after layer k: each is compared with those that the public model gives for the whole vocabulary.

A layer looks only backwards, so the vector at a position depends on the tokens up to there. Those before are known, being
found one by one: what is left is to try every token at this position. The likeliest are tried first.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.attack.public import PublicModel
from tpimpi.compute.arrays import F32
from tpimpi.errors import TpimpiError

TRIED_FIRST = (64, 1024)  # tokens by what the model expects next, and as many by how near their rows are; then all
TRIED_AT_ONCE = 2048
# How near the right token's vector is, against the median of those tried: 0.003 to 0.08 with SmolLM2 after layer 8, by the
# rounding of activations and wire; that of another spelling (" Why" for "Why") is at 0.13.
MAX_DISTANCE = 0.1


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
        norms = np.linalg.norm(model.table, axis=1, keepdims=True)
        self._directions = model.table / np.maximum(norms, 1e-30)
        self._usual: set[int] = set()  # tokens of the chat template, which every conversation has
        with suppress(TpimpiError):
            self._usual |= set(model.tokenizer.encode_chat(""))

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
        near = np.argsort(-(self._directions @ vector))
        likely = None if expected is None else np.argsort(-expected)
        done: set[int] = set()
        for count in (*TRIED_FIRST, len(self._directions)):
            tokens = self._usual | set(near[:count].tolist()) | set(() if likely is None else likely[:count].tolist())
            tried = sorted(tokens - done)
            if not tried:
                break
            distances = self._distances(vector, prefix, tried)
            if distances.min() <= MAX_DISTANCE * np.median(distances):
                return tried[int(distances.argmin())]
            done |= tokens
        return None

    def _distances(self, vector: F32, prefix: Any, tokens: list[int]) -> F32:
        """From `vector` to what each token would give at its position: [tokens]."""
        import torch

        found = []
        for start in range(0, len(tokens), TRIED_AT_ONCE):
            some = tokens[start : start + TRIED_AT_ONCE]
            past = copy.deepcopy(prefix)
            if past.get_seq_length():
                past.batch_repeat_interleave(len(some))
            out = self._first(torch.tensor(some)[:, None], past_key_values=past, use_cache=True).last_hidden_state
            found.append(np.linalg.norm(out[:, -1].numpy() - vector, axis=1))
        return np.concatenate(found)
