"""The rotary angles and the windows of transformers' own models, compared with those of a ModelConfig."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tpimpi.models.config import ModelConfig
from tpimpi.models.layers.rope import angles, rope_frequencies

SLIDING = "sliding_attention"
START, POSITIONS = 100, 5


def check_angles_and_windows(config: ModelConfig, theirs: Any) -> None:
    """Of every layer, the angles that its positions are turned by, and its window, against those of transformers' config."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)]
    rotary = getattr(sys.modules[model.__module__], model.__name__.replace("ForCausalLM", "RotaryEmbedding"))(theirs)
    positions = torch.arange(POSITIONS)[None] + START
    numbers = np.arange(START, START + POSITIONS, dtype=np.int32)
    types = getattr(theirs, "layer_types", None)
    window = (
        theirs.sliding_window
        if getattr(theirs, "use_sliding_window", True) and hasattr(theirs, "sliding_window")
        else 0
    )
    for layer in range(config.layers):
        spec = config.layer(layer)
        assert spec.attention.window == ((window or 0) if types is None or types[layer] == SLIDING else 0), layer
        if spec.rope is None:
            continue
        which = (types[layer],) if types is not None and hasattr(rotary, "layer_types") else ()
        cos, sin = rotary(torch.zeros(1), positions, *which)
        if config.architecture == "cohere2":  # each angle twice, where others have the first half once more
            cos, sin = cos[..., ::2], sin[..., ::2]
        mine = angles(spec.rope, rope_frequencies(spec.rope, START + POSITIONS), numbers)
        half = mine.cos.shape[1]
        assert half == spec.rope.dims // 2 and cos.shape[-1] in (half, 2 * half)
        np.testing.assert_allclose(mine.cos, cos[0, :, :half].numpy(), atol=3e-5)
        np.testing.assert_allclose(mine.sin, sin[0, :, :half].numpy(), atol=3e-5)
