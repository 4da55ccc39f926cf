"""What families of mixtures of experts have in common: the tensors of a router and of experts, as most files name them."""

from __future__ import annotations

from tpimpi.models.architectures.base import FusedSpec, TensorSpec

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
