"""What one rank has to go through for a token, in bytes of tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpimpi.models.blocks import LAYER_KINDS, experts_block
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import LayerFormats, ModelFormats
from tpimpi.weights.slices.layout import Record, slice_records
from tpimpi.weights.slices.partition import Share


@dataclass(frozen=True)
class LayerLoad:
    """Layers of one kind: how many, and the bytes of each: attention, what every position uses of the MLP, one expert."""

    count: int
    attn: int
    mlp: int
    expert: int = 0


@dataclass(frozen=True)
class Load:
    """One rank's part of a model."""

    layers: tuple[LayerLoad, ...]
    head: int
    records: tuple[Record, ...]  # of a layer of each kind, and of the head
    experts: tuple[Record, ...] = ()  # one of each kind of layer
    expert_count: int = 0  # in all layers
    chosen: int = 0  # experts of a layer that a token uses

    @property
    def tiles(self) -> int:
        """What every token uses."""
        return self.head + sum(layer.count * (layer.attn + layer.mlp) for layer in self.layers)

    @property
    def chosen_bytes(self) -> int:
        """The experts that a token uses."""
        return self.chosen * sum(layer.count * layer.expert for layer in self.layers)

    @property
    def token(self) -> int:
        """All that a token goes through."""
        return self.tiles + self.chosen_bytes


class Loads:
    """The loads of a model's shares, each worked out once."""

    def __init__(self, config: ModelConfig, formats: ModelFormats) -> None:
        self._config = config
        self._counts: Mapping[LayerFormats, int] = Counter(formats.layers)
        kinds = tuple(self._counts)
        self._formats = replace(formats, layers=kinds)
        dense = tuple(layer for layer, kind in enumerate(kinds) if not kind.expert_gate)
        self._small = replace(config.with_layers(len(kinds)), dense_layers=dense if config.experts else ())
        self._found: dict[tuple[Share, bool], Load] = {}

    def load(self, share: Share, rank: int) -> Load:
        """What a rank with this share goes through."""
        key = (share, rank == 0)
        if key not in self._found:
            records = list(slice_records(self._small, share, rank, self._formats, {}))
            layers, experts, expert_count = [], [], 0
            for layer, count in enumerate(self._counts.values()):
                sizes = {
                    kind: sum(record.nbytes for record in records if record.block == (kind, layer))
                    for kind in LAYER_KINDS
                }
                own = [record for record in records if record.block == experts_block(layer)]
                experts += own[:1]
                expert_count += len(own) * count
                expert = own[0].nbytes if own else 0
                layers.append(LayerLoad(count, sizes["qkv"] + sizes["attn"], sizes["mlp"], expert))
            head = sum(record.nbytes for record in records if record.block.kind == "head")
            used = tuple(record for record in records if record.block.kind in (*LAYER_KINDS, "head"))
            chosen = self._config.experts_per_token
            self._found[key] = Load(tuple(layers), head, used, tuple(experts), expert_count, chosen)
        return self._found[key]
