"""Known models' shapes, for weights made up by `synth`: what config_hf reads of their published config.json files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpimpi.errors import InputError, ModelError, shorten_path
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf
from tpimpi.models.keys import MAX_LAYERS

_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MAX_CONFIG_BYTES = 1 << 20  # of a config.json


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    """A config.json: a Llama unless `more` says otherwise."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


def _llama_3_1(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    more = {"rope_theta": 500000.0, "rope_scaling": _LLAMA_3_1_ROPE}
    return _shape(hidden, intermediate, layers, heads, 8, 128256, 131072, **more)


SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4, 32000, 2048),
    "open-llama-3b": _shape(3200, 8640, 26, 32, 32, 32000, 2048),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _shape(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": _shape(8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3-70b": _shape(8192, 28672, 80, 64, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3.1-8b": _llama_3_1(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama_3_1(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama_3_1(16384, 53248, 126, 128),
    "yi-34b": _shape(7168, 20480, 60, 56, 8, 64000, 4096, rope_theta=5000000.0),
    "qwen2.5-72b": _shape(
        *(8192, 29568, 80, 64, 8, 152064, 131072),
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        rope_theta=1000000.0,
    ),
}


@dataclass(frozen=True)
class Shape:
    """A model without its weights: its name, its config.json as it is read, and what that means."""

    name: str
    values: dict[str, Any]
    config: ModelConfig


def load_shape(wanted: str, layers: int | None = None) -> Shape:
    """The shape that `--shape` names: one of SHAPES, or a config.json, or a folder that holds one; `layers` of them.

    Raises InputError for a name that is not known, and whatever config_from_hf raises.
    """
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise InputError(f"--layers is {layers}, must be 1 to {MAX_LAYERS}")
    if wanted in SHAPES:
        name, values, where = wanted, dict(SHAPES[wanted]), f"shape {wanted}"
    else:
        path = _config_path(wanted)
        name, values, where = path.resolve().parent.name or "model", _read(path), str(path)
    if layers is not None:
        config_from_hf(values, where)  # so that what is wrong is said of the file, not of our change to it
        values["num_hidden_layers"] = layers
        if isinstance(values.get("layer_types"), list):
            values["layer_types"] = [
                values["layer_types"][layer % len(values["layer_types"])] for layer in range(layers)
            ]
        name = f"{name}-{layers}-layer{'s' if layers > 1 else ''}"
    return Shape(name, values, config_from_hf(values, where))


def _config_path(wanted: str) -> Path:
    try:
        path = Path(wanted).expanduser()
        if path.is_dir():
            path /= "config.json"
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, a NUL, an unknown home
        pass
    raise InputError(
        f"--shape is {shorten_path(wanted)!r}, must be one of {', '.join(SHAPES)}, or the path of a config.json (or of "
        "its folder)"
    )


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; let your user read it") from error
    if len(data) > _MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: is longer than {_MAX_CONFIG_BYTES >> 20} MiB; give a model's config.json")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON ({error}); give a model's config.json") from error
