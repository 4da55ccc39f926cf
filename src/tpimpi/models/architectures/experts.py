"""What families of mixtures of experts have in common: the tensors of a router and of experts, as most files name them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import MLP, FusedSpec, TensorSpec
from tpimpi.models.keys import Keys, show

# transformers writes the first for every family, whatever the published files have.
EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")

# One tensor for each expert in Hugging Face files; in GGUF all experts' as one, in files of 2023 one for each.
ROUTER = TensorSpec("router", "mlp.gate", "ffn_gate_inp", ("experts", "hidden"), layers="experts")
DENSE_MLP = tuple(replace(spec, layers="dense") for spec in MLP)  # of layers without experts
GGUF_STACKED_EXPERTS = (
    FusedSpec(None, "ffn_gate_exps", ("expert_gate",)),
    FusedSpec(None, "ffn_up_exps", ("expert_up",)),
    FusedSpec(None, "ffn_down_exps", ("expert_down",)),
)


def expert_tensors(
    where: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[TensorSpec, ...]:
    """Gate, up and down of each expert, by their names in Hugging Face files: `where`.EXPERT.NAME."""
    gate, up, down = (f"{where}.{{expert}}.{name}" for name in names)
    return (
        TensorSpec("expert_gate", gate, "ffn_gate.{expert}", ("expert", "hidden"), "expert_bias", layers="experts"),
        TensorSpec("expert_up", up, "ffn_up.{expert}", ("expert", "hidden"), "expert_bias", layers="experts"),
        TensorSpec("expert_down", down, "ffn_down.{expert}", ("hidden", "expert"), "expert_bias", layers="experts"),
    )


EXPERTS = expert_tensors("mlp.experts")


def hf_experts(keys: Keys, count: int, columns: str = "intermediate_size", *, normalized: bool) -> dict[str, Any]:
    """Fields of a config.json; `count` is how many experts there are where no key says so, `columns` the key of an
    expert's. ModelError where keys differ."""
    found = [name for name in EXPERT_COUNT_KEYS if name in keys.values]
    counts = [keys.integer(name) for name in found] or [count]
    if len(set(counts)) > 1:
        raise ModelError(
            f"{keys.path}: {found[0]} is {show(counts[0])} and {found[1]} is {show(counts[1])}; the two must be the same"
        )
    return {
        "experts": counts[0],
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "expert_intermediate": keys.integer(columns),
        "router_normalized": normalized,
    }


def gguf_experts(keys: Keys, columns: str = "expert_feed_forward_length", *, normalized: bool) -> dict[str, Any]:
    """Fields of a GGUF file; `columns` is the key of an expert's. llama.cpp knows by the family what is `normalized`."""
    return {
        "experts": keys.integer("expert_count"),
        "experts_per_token": keys.integer("expert_used_count"),
        "expert_intermediate": keys.integer(columns),
        "router_normalized": normalized,
    }
