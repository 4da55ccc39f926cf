"""What tests of synth share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.launch import Result
from tpimpi.models.shapes import load_shape
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.sources.synthetic import SyntheticSource

Cli = Callable[..., Result]


SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}


LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3.1": {"rope_scaling": LLAMA_3_1},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
}


def write_config(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**SMALL, **KINDS[kind], **changes}))
    return path


def made(config: Path, fmt: str = "q4_0", seed: int = 0) -> SyntheticSource:
    shape = load_shape(str(config))
    return SyntheticSource(shape, ModelFormats.for_model(fmt, shape.config), seed)
