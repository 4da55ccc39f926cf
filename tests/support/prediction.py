"""A model and ranks whose predicted times are easily worked out by hand."""

from __future__ import annotations

from tpimpi.diagnostics.options import Workload
from tpimpi.diagnostics.planner.costs import LayerCost, LinearCost, Measured, RankSpeed
from tpimpi.diagnostics.planner.predict import Predictor
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.system.memory import Place

GB = 10**9


CONFIG = ModelConfig(
    architecture="llama",
    hidden=1024,
    intermediate=2048,
    layers=10,
    heads=16,
    kv_heads=16,
    head_dim=64,
    vocab=4096,
    context=4096,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    attention_windows=(0,) * 10,
    tied_head=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


FORMATS = ModelFormats.of("bf16", 10)


WORKLOAD = Workload(CONFIG, FORMATS, context=128, prompt=16, memory=(8 * GB,))


def speed(per_gb: float = 1.0, fixed: float = 0.0, **more: object) -> RankSpeed:
    """A rank that takes so many seconds for a GB of a layer's weights, and four times as long for 16 positions."""
    line = LinearCost(fixed, per_gb / GB)
    chunk = LinearCost(4 * fixed, 4 * per_gb / GB)
    given = {"host": "vm", "processors": 1.0, "base": 100_000_000, "places": (Place("", 16 * GB, 12 * GB),), **more}
    return RankSpeed(token=LayerCost(line, line), chunk=LayerCost(chunk, chunk), **given)  # type: ignore[arg-type]


def predictor(*ranks: RankSpeed, allreduce: float = 0.0, head: float = 0.0, workload: Workload = WORKLOAD) -> Predictor:
    line = LinearCost(0.0, head / GB)
    return Predictor(workload, Measured(ranks, 16, allreduce, 3 * allreduce, line, line))
