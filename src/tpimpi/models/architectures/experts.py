"""What families of mixtures of experts have in common: the tensors of a router and of experts, as most files name them."""

from __future__ import annotations

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import FusedSpec, TensorSpec
from tpimpi.models.keys import Keys, show

# transformers writes the first for every family, whatever the published files have.
EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts")


def hf_expert_count(keys: Keys, default: int | None = None) -> int:
    """How many experts a layer has, by either key of config.json. ModelError where they differ."""
    found = [name for name in EXPERT_COUNT_KEYS if name in keys.values]
    counts = [keys.integer(name) for name in found] or [keys.integer(EXPERT_COUNT_KEYS[0], default=default)]
    if len(set(counts)) > 1:
        raise ModelError(
            f"{keys.path}: {found[0]} is {show(counts[0])} and {found[1]} is {show(counts[1])}; the two must be the same"
        )
    return counts[0]


# One tensor for each expert in Hugging Face files; in GGUF all experts' as one.
ROUTER = TensorSpec("router", "mlp.gate", "ffn_gate_inp", ("experts", "hidden"), layers="experts")
EXPERTS = (
    TensorSpec(
        "expert_gate",
        "mlp.experts.{expert}.gate_proj",
        "ffn_gate.{expert}",
        ("expert", "hidden"),
        "expert_bias",
        layers="experts",
    ),
    TensorSpec(
        "expert_up",
        "mlp.experts.{expert}.up_proj",
        "ffn_up.{expert}",
        ("expert", "hidden"),
        "expert_bias",
        layers="experts",
    ),
    TensorSpec(
        "expert_down",
        "mlp.experts.{expert}.down_proj",
        "ffn_down.{expert}",
        ("hidden", "expert"),
        "expert_bias",
        layers="experts",
    ),
)
GGUF_STACKED_EXPERTS = (
    FusedSpec(None, "ffn_gate_exps", ("expert_gate",)),
    FusedSpec(None, "ffn_up_exps", ("expert_up",)),
    FusedSpec(None, "ffn_down_exps", ("expert_down",)),
)
