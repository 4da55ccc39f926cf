"""The families of models that tpimpi computes, a small module each.

To add one: a module that says its tensors and how its config is read (see `base.Architecture`), and its line below. A layer
that is not attention and SwiGLU between norms also needs its mathematics, in tpimpi.models.layers.
"""

from __future__ import annotations

from tpimpi.models.architectures.base import Architecture, TensorSpec
from tpimpi.models.architectures.llama import LLAMA
from tpimpi.models.architectures.mistral import MISTRAL
from tpimpi.models.architectures.qwen2 import QWEN2
from tpimpi.models.architectures.qwen3 import QWEN3

__all__ = ["ARCHITECTURES", "GGUF_ARCHITECTURES", "Architecture", "TensorSpec"]

_FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)

# By ModelConfig.architecture, which is model_type in config.json.
ARCHITECTURES: dict[str, Architecture] = {family.name: family for family in _FAMILIES}
# By general.architecture in GGUF; of those that share a name there (Mistral is a llama) the first.
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
for _family in _FAMILIES:
    GGUF_ARCHITECTURES.setdefault(_family.gguf_name, _family)
