"""What an attention is, beside its arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """How the queries of a layer see its keys: scores are q k times `scale`.

    With a `softcap` c > 0 they then become c tanh(score / c). A position sees the last `window` positions, itself included;
    0: all up to itself.
    """

    scale: float
    softcap: float = 0.0
    window: int = 0
