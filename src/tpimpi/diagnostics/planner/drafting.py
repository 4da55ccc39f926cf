"""What a draft model (--draft) costs rank 0, before it is sliced: seconds for a token, and memory."""

from __future__ import annotations

from tpimpi.diagnostics.options import Workload
from tpimpi.diagnostics.planner.loads import Loads
from tpimpi.engine.needs import needs_of_model
from tpimpi.engine.overlap import default_chunk
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.partition import make_partition


class DraftCost:
    """Of a model with slices for one rank, all of which stays in memory. Of layers and head it has `layers` and these many
    bytes: what a token goes through."""

    def __init__(self, config: ModelConfig, formats: ModelFormats) -> None:
        self._config, self._formats = config, formats
        self._partition = make_partition(config, [1.0])
        self._load = load = Loads(config, formats).load(self._partition.shares[0], 0)
        self.layers, self.head_bytes = config.layers, load.head
        self.layer_bytes = load.token - load.head

    def memory(self, workload: Workload, backend: str) -> int:
        """Bytes that it takes from what rank 0 may have, with room for the workload's positions."""
        config, load = self._config, self._load
        needs = needs_of_model(
            Header(0, self._formats, "", "", config, self._partition, ()),
            load.records,
            tiles=load.tiles,
            base=0,
            backend=backend,
            kv_format=workload.kv_format,
            allreduce="star",
            context=min(workload.context, config.context),
            chunk=default_chunk(config),
            experts=load.experts,
            expert_count=load.expert_count,
        )
        return needs.tiles + needs.experts + needs.cache
