"""The families of models that tpimpi computes, a small module each.

To add one: a module that says its tensors and how its config is read (see `base.Architecture`), and its line below. What a
layer is must be said in `models.layer_spec`; mathematics that is not there yet is added to `models.layers`.
"""

from __future__ import annotations

from tpimpi.models.architectures.base import Architecture, FusedSpec, TensorSpec
from tpimpi.models.architectures.cohere2 import COHERE2
from tpimpi.models.architectures.exaone4 import EXAONE4
from tpimpi.models.architectures.gemma import GEMMA2, GEMMA3
from tpimpi.models.architectures.glm import GLM, GLM4
from tpimpi.models.architectures.glm4_moe import GLM4_MOE
from tpimpi.models.architectures.gpt_oss import GPT_OSS
from tpimpi.models.architectures.granite import GRANITE, GRANITE_HYBRID
from tpimpi.models.architectures.granite_moe import GRANITE_MOE
from tpimpi.models.architectures.llama import LLAMA
from tpimpi.models.architectures.ministral3 import MINISTRAL3
from tpimpi.models.architectures.mistral import MINISTRAL, MISTRAL
from tpimpi.models.architectures.mixtral import MIXTRAL
from tpimpi.models.architectures.olmo import OLMO2, OLMO3
from tpimpi.models.architectures.olmoe import OLMOE
from tpimpi.models.architectures.phi3 import PHI3
from tpimpi.models.architectures.qwen2 import QWEN2
from tpimpi.models.architectures.qwen3 import QWEN3
from tpimpi.models.architectures.qwen3_moe import QWEN3_MOE
from tpimpi.models.architectures.smollm3 import SMOLLM3

__all__ = ["ARCHITECTURES", "GGUF_ARCHITECTURES", "Architecture", "FusedSpec", "TensorSpec", "gguf_family"]

_FAMILIES = (
    *(LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, GEMMA2, GEMMA3),
    *(PHI3, GRANITE, GRANITE_HYBRID, SMOLLM3, GLM, GLM4, EXAONE4, COHERE2, OLMO2, OLMO3),
    *(MIXTRAL, QWEN3_MOE, GPT_OSS, OLMOE, GRANITE_MOE, GLM4_MOE),
)

# By ModelConfig.architecture, which is model_type in config.json.
ARCHITECTURES: dict[str, Architecture] = {family.name: family for family in _FAMILIES}
# By general.architecture in GGUF; of those that share a name there (Mistral is a llama) the first.
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
_GGUF_MIXTURES: dict[str, Architecture] = {}  # the same of those that have experts
for _family in _FAMILIES:
    GGUF_ARCHITECTURES.setdefault(_family.gguf_name, _family)
    if _family.mixture:
        _GGUF_MIXTURES.setdefault(_family.gguf_name, _family)


def gguf_family(name: str, *, mixture: bool) -> Architecture:
    """The family of a GGUF file by its general.architecture, which is one of GGUF_ARCHITECTURES, and whether it has
    experts: a llama that has is a Mixtral."""
    return _GGUF_MIXTURES.get(name, GGUF_ARCHITECTURES[name]) if mixture else GGUF_ARCHITECTURES[name]
