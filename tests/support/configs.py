"""Configurations of small models."""

from __future__ import annotations

from tpimpi.models.config import ModelConfig


def config(
    *,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 160,
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        hidden=hidden,
        intermediate=intermediate,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=128,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        attention_windows=(0,),
        tied_head=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )
