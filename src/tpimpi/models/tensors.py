"""The tensors of a model: which ones its config says that it has, their shapes, and their names in files.

A tensor's canonical name is Hugging Face's without "model.": "layers.3.self_attn.q_proj.weight".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tpimpi.models.architectures import ARCHITECTURES, TensorSpec
from tpimpi.models.architectures.base import EMBEDDING as EMBEDDING_SPEC
from tpimpi.models.architectures.base import HEAD as HEAD_SPEC
from tpimpi.models.architectures.base import OUTPUT_NORM
from tpimpi.models.config import ModelConfig

EMBEDDING = f"{EMBEDDING_SPEC.hf}.weight"
HEAD = f"{HEAD_SPEC.hf}.weight"
NORM = f"{OUTPUT_NORM.hf}.weight"  # of the output


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a model: its canonical name, its name in GGUF files, and its shape, [out, in] or [out].

    `part` is what tiles and slices call it; a bias has the part of its matrix. `layer` is -1 beside the layers.
    """

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    part: str
    layer: int

    @property
    def hf_name(self) -> str:
        """Its name in safetensors files."""
        return hf_name(self.name)


def model_tensors(config: ModelConfig) -> dict[str, ModelTensor]:
    """Every tensor of a model of this config by its canonical name, no more and no fewer, in the order of the model."""
    return {tensor.name: tensor for tensor in _tensors(config)}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a model of this config has: canonical name -> shape [out, in], or [out]. No more and no fewer."""
    return {tensor.name: tensor.shape for tensor in _tensors(config)}


def hf_name(name: str) -> str:
    """The name in safetensors files of a tensor with this canonical name."""
    return name if name == HEAD else f"model.{name}"


def canonical_hf_name(name: str) -> str:
    """Undoes `hf_name`; a name without "model." stays as it is."""
    return name.removeprefix("model.")


def canonical_text_name(name: str) -> str | None:
    """The canonical name of a tensor of a multimodal model's safetensors; None for one that is not of its text part."""
    for prefix in ("model.language_model.", "language_model.model.", "language_model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    other = name.removeprefix("model.").split(".")[0] in ("vision_tower", "multi_modal_projector")
    return None if other else canonical_hf_name(name)


def part_name(config: ModelConfig, layer: int, part: str, kind: str = "weight") -> str:
    """The canonical name of the tensor that a part of a layer comes from; `kind` is weight or bias."""
    family = ARCHITECTURES[config.architecture]
    spec = next(spec for spec in family.layer if spec.part == part)
    return f"layers.{layer}.{spec.hf}.{kind}"


def head_name(config: ModelConfig) -> str:
    """The canonical name of the tensor that the output head is made of: of a tied model its embedding table."""
    return EMBEDDING if config.tied_head else HEAD


def interleaved_heads(config: ModelConfig, part: str, *, hf: bool = False) -> int:
    """How many heads the rows of this matrix have where a file, GGUF or `hf`, interleaves them within each head, else 0.

    Of the rows that are rotated (`rotated_rows`), row 2i of a head is then that which is paired with row 2i + 1: its row i
    and i + half of them in slices.
    """
    family = ARCHITECTURES[config.architecture]
    if not (family.hf_interleaves_qk if hf else family.gguf_interleaves_qk):
        return 0
    return {"q": config.heads, "k": config.kv_heads}.get(part, 0)


def rotated_rows(config: ModelConfig) -> int:
    """How many rows of a head of Q or K are rotated: the first."""
    return config.rotary_dims or config.head_dim


def hf_norm_offset(config: ModelConfig) -> float:
    """What is to be added to the norms' weights of safetensors files."""
    return ARCHITECTURES[config.architecture].hf_norm_offset


def layer_norms(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The norms of a layer by their parts' names, and their shapes; the order is that of slices."""
    order = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_norm", "k_norm")
    specs = {spec.part: spec for spec in ARCHITECTURES[config.architecture].layer}
    return {part: _shape(config, specs[part]) for part in order if part in specs}


class Piece(NamedTuple):
    """Some rows of a fused matrix, and the canonical name of the matrix that they are."""

    name: str
    first: int
    rows: int


def fused_tensors(config: ModelConfig, *, hf: bool) -> dict[str, list[Piece]]:
    """The matrices, and their biases, that a file, safetensors or GGUF, may hold as one, by its name there ("model." left
    out)."""
    family = ARCHITECTURES[config.architecture]
    tensors = model_tensors(config)
    found = {}
    for spec in family.fused:
        stored = spec.hf if hf else spec.gguf
        if stored is None:
            continue
        for layer in range(config.layers):
            for kind in ("weight", "bias"):
                pieces: list[Piece] = []
                for name in (part_name(config, layer, part, kind) for part in spec.parts):
                    if name in tensors:
                        pieces.append(Piece(name, sum(piece.rows for piece in pieces), tensors[name].shape[0]))
                if pieces:
                    found[f"{'layers' if hf else 'blk'}.{layer}.{stored}.{kind}"] = pieces
    return found


def _shape(config: ModelConfig, spec: TensorSpec) -> tuple[int, ...]:
    sizes = {
        "hidden": config.hidden,
        "intermediate": config.intermediate,
        "queries": config.heads * config.head_dim,
        "keys": config.kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "vocab": config.vocab,
    }
    return tuple(sizes[dimension] for dimension in spec.shape)


def _tensors(config: ModelConfig) -> Iterator[ModelTensor]:
    def of(spec: TensorSpec, layer: int = -1) -> Iterator[ModelTensor]:
        shape = _shape(config, spec)
        hf, gguf = (spec.hf, spec.gguf) if layer < 0 else (f"layers.{layer}.{spec.hf}", f"blk.{layer}.{spec.gguf}")
        yield ModelTensor(f"{hf}.weight", f"{gguf}.weight", shape, spec.part, layer)
        if spec.bias is not None and getattr(config, spec.bias):
            yield ModelTensor(f"{hf}.bias", f"{gguf}.bias", shape[:1], spec.part, layer)

    yield from of(EMBEDDING_SPEC)
    for layer in range(config.layers):
        for spec in ARCHITECTURES[config.architecture].layer:
            yield from of(spec, layer)
    yield from of(OUTPUT_NORM)
    if not config.tied_head:
        yield from of(HEAD_SPEC)
