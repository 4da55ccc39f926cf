"""A model's blocks, in the order in which a token goes through them."""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """One unit of the model's order of computation: `attn` or `mlp` of a layer, or the `head` (layer -1)."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return self.kind if self.kind == "head" else f"layer {self.layer} {self.kind}"


HEAD = Block("head", -1)
