"""A model's blocks, in the order in which a token goes through them."""

from __future__ import annotations

from typing import NamedTuple

from tpimpi.models.config import ModelConfig


class Block(NamedTuple):
    """One unit of the model's order of computation: `attn` or `mlp` of a layer, or the `head` (layer -1).

    Where queries and keys are normed over all heads, a layer has a third block before these, `qkv`: the projections, after
    which the ranks add up their sums of squares; its `attn` then has only the output projection.
    """

    kind: str
    layer: int

    def __str__(self) -> str:
        return self.kind if self.kind == "head" else f"layer {self.layer} {self.kind}"


HEAD = Block("head", -1)
LAYER_KINDS = ("qkv", "attn", "mlp")  # of blocks of a layer, in order


def experts_block(layer: int) -> Block:
    """The block whose tiles are the experts of a layer."""
    return Block("experts", layer)


def layer_blocks(config: ModelConfig, layer: int) -> list[Block]:
    """The blocks of one layer, in order."""
    return [Block(kind, layer) for kind in LAYER_KINDS if kind != "qkv" or config.qk_norm_over_all]
