"""The families of models by the names that GGUF files have for them."""

from __future__ import annotations

from tpimpi.models.architectures import ARCHITECTURES, Architecture

# By general.architecture; of those that share a name there (Mistral is a llama) the first.
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
_MIXTURES: dict[str, Architecture] = {}  # the same of those that have experts
for _family in ARCHITECTURES.values():
    GGUF_ARCHITECTURES.setdefault(_family.gguf_name, _family)
    if _family.mixture:
        _MIXTURES.setdefault(_family.gguf_name, _family)


def gguf_family(name: str, *, mixture: bool) -> Architecture:
    """The family of a GGUF file by its general.architecture, which is one of GGUF_ARCHITECTURES, and whether it has
    experts: a llama that has is a Mixtral."""
    return _MIXTURES.get(name, GGUF_ARCHITECTURES[name]) if mixture else GGUF_ARCHITECTURES[name]
