"""EXAONE 4 (LG AI Research 2025, arXiv 2507.11407): norms after the blocks only, and over queries and keys.

The 32B model has a window in three of four layers, and no positions in the fourth.
"""

from __future__ import annotations

from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import (
    ATTENTION,
    GGUF_PATTERN,
    MLP,
    QK_NORM,
    Architecture,
    gguf_periodic_windows,
    gguf_window,
    hf_window,
    hf_windows_of_types,
)
from tpimpi.models.architectures.gemma import POST_NORMS
from tpimpi.models.keys import Keys, show

_WINDOW = 4096  # positions
_PERIOD = 4
_LAYERS_OF_32B = 64


def _without_positions(windows: tuple[int, ...]) -> dict[str, Any]:
    """Where some layers have a window the others have no positions."""
    unrotated = tuple(layer for layer, window in enumerate(windows) if not window) if any(windows) else ()
    return {"pre_norms": False, "post_norms": True, "unrotated_layers": unrotated}


def _hf_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    if not hf_window(keys, _WINDOW):
        return (0,) * layers
    period, pattern = _PERIOD, keys.values.get("sliding_window_pattern")
    if pattern is not None and keys.values.get("layer_types") is None:
        if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:  # such as LLLG, of the first files
            return tuple(
                hf_window(keys, _WINDOW) if pattern[layer % len(pattern)] == "L" else 0 for layer in range(layers)
            )
        if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
            raise ModelError(f"{keys.path}: sliding_window_pattern is {show(pattern)}; LLLG, or a number, is needed")
        period = pattern
    return hf_windows_of_types(_WINDOW, period)(keys, layers)


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return _without_positions(_hf_windows(keys, layers))


def _gguf_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    if keys.values.get(keys.prefix + GGUF_PATTERN) is None and layers != _LAYERS_OF_32B:
        return (0,) * layers
    return gguf_periodic_windows(_PERIOD, _WINDOW)(keys, layers) if gguf_window(keys, _WINDOW) else (0,) * layers


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return _without_positions(_gguf_windows(keys, layers))


EXAONE4 = Architecture(
    name="exaone4",
    hf_class="Exaone4ForCausalLM",
    gguf_name="exaone4",
    layer_tensors=(*ATTENTION, *MLP, *QK_NORM, *POST_NORMS),
    hf_keys=frozenset({"sliding_window", "sliding_window_pattern", "layer_types"}),
    hf_defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
    },
    hf_windows=_hf_windows,
    hf_fields=_hf_fields,
    gguf_keys=frozenset({GGUF_PATTERN}),
    gguf_windows=_gguf_windows,
    gguf_fields=_gguf_fields,
)
