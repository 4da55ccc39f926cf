"""The families of models that tpimpi computes, a small module each.

To add one: a module that says its tensors and how its config is read (see `base.Architecture`), and its line below. What a
layer is must be said in `models.layer_spec`; mathematics that is not there yet is added to `models.layers`.
"""

from __future__ import annotations

from tpimpi.models.architectures.base import Architecture, FusedSpec, TensorSpec
from tpimpi.modules import ModuleTable

__all__ = ["ARCHITECTURES", "Architecture", "FusedSpec", "TensorSpec"]

# By ModelConfig.architecture, which is model_type in config.json.
ARCHITECTURES = ModuleTable[Architecture](
    __name__,
    {
        "llama": "llama.LLAMA",
        "mistral": "mistral.MISTRAL",
        "ministral": "mistral.MINISTRAL",
        "ministral3": "ministral3.MINISTRAL3",
        "qwen2": "qwen2.QWEN2",
        "qwen3": "qwen3.QWEN3",
        "gemma2": "gemma.GEMMA2",
        "gemma3_text": "gemma.GEMMA3",
        "phi3": "phi3.PHI3",
        "granite": "granite.GRANITE",
        "granitemoehybrid": "granite.GRANITE_HYBRID",
        "smollm3": "smollm3.SMOLLM3",
        "glm": "glm.GLM",
        "glm4": "glm.GLM4",
        "exaone4": "exaone4.EXAONE4",
        "cohere2": "cohere2.COHERE2",
        "olmo2": "olmo.OLMO2",
        "olmo3": "olmo.OLMO3",
        "mixtral": "mixtral.MIXTRAL",
        "qwen3_moe": "qwen3_moe.QWEN3_MOE",
        "gpt_oss": "gpt_oss.GPT_OSS",
        "olmoe": "olmoe.OLMOE",
        "granitemoe": "granite_moe.GRANITE_MOE",
        "glm4_moe": "glm4_moe.GLM4_MOE",
    },
)
