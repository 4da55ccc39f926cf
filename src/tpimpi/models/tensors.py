"""The tensors of a model: which ones its config says that it has, their shapes, and their names in files.

A tensor's canonical name is Hugging Face's without "model.": "layers.3.self_attn.q_proj.weight".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from tpimpi.models.architectures import ARCHITECTURES, FusedSpec, TensorSpec
from tpimpi.models.architectures.base import EMBEDDING, HEAD, OUTPUT_NORM
from tpimpi.models.config import ModelConfig

EMBEDDING_NAME = f"{EMBEDDING.hf}.weight"
HEAD_NAME = f"{HEAD.hf}.weight"
NORM_NAME = f"{OUTPUT_NORM.hf}.weight"  # of the output

Found = TypeVar("Found")


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a model: its canonical name, its name in GGUF files, and its shape, [out, in] or [out].

    `part` is what tiles and slices call it; a bias has the part of its matrix. `layer` is -1 beside the layers, `expert` -1
    for what is no expert's.
    """

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    part: str
    layer: int
    expert: int = -1

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


def unused_parameters(config: ModelConfig) -> int:
    """How many of a mixture's parameters a token does not use: those of the experts that it does not choose."""
    if not config.experts:
        return 0
    sizes = [math.prod(tensor.shape) for tensor in model_tensors(config).values() if tensor.expert >= 0]
    return sum(sizes) * (config.experts - config.experts_per_token) // config.experts


def hf_name(name: str) -> str:
    """The name in safetensors files of a tensor with this canonical name."""
    return name if name == HEAD_NAME else f"model.{name}"


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


def has_part(config: ModelConfig, layer: int, spec: TensorSpec) -> bool:
    """Whether this layer of a model has this tensor."""
    if spec.part in ("q_norm", "k_norm"):
        return config.qk_norm
    if spec.layers == "all":
        return True
    if config.router(layer) is None:
        return spec.layers == "dense"
    return spec.layers == "experts" or (spec.layers == "shared" and config.shared_intermediate > 0)


def layer_specs(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    """The tensors of a layer by their parts, in the family's order."""
    specs = ARCHITECTURES[config.architecture].layer_tensors
    return {spec.part: spec for spec in specs if has_part(config, layer, spec)}


def part_name(config: ModelConfig, layer: int, part: str, kind: str = "weight", expert: int = -1) -> str:
    """The canonical name of the tensor that a part of a layer comes from; `kind` is weight or bias."""
    spec = layer_specs(config, layer)[part]
    return f"layers.{layer}.{_in_layer(spec.hf, spec, kind, expert)}"


def _in_layer(name: str, spec: TensorSpec, kind: str, expert: int) -> str:
    """The name of a tensor without the layer's, by its spelling in a kind of files."""
    if spec.per_expert:
        name = name.replace("{expert}", str(expert))
    return name if spec.bare_name else f"{name}.{kind}"


def head_name(config: ModelConfig) -> str:
    """The canonical name of the tensor that the output head is made of: of a tied model its embedding table."""
    return EMBEDDING_NAME if config.tied_head else HEAD_NAME


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
    specs = layer_specs(config, 0)
    return {part: _shape(config, specs[part], 0) for part in order if part in specs}


class Piece(NamedTuple):
    """Some rows of a fused matrix, every `step`th from `first` on, and the canonical name of the matrix that they are.

    Of a stack of all experts' matrices `height` is the rows of each, and `first` counts from the first expert's; where it
    is `transposed` a file that has it in numbers has [experts, columns, rows].
    """

    name: str
    first: int
    rows: int
    step: int = 1
    height: int = 0
    transposed: bool = False


def fused_tensors(config: ModelConfig, *, hf: bool) -> dict[str, list[Piece]]:
    """The matrices, and their biases, that a file, safetensors or GGUF, may hold as one, by its name there ("model." left
    out)."""
    found = {}
    for fused in ARCHITECTURES[config.architecture].fused:
        stored = fused.hf if hf else fused.gguf
        if stored is None:
            continue
        for layer in range(config.layers):
            here = layer_specs(config, layer)
            for kind in ("weight", "bias"):
                specs = [here[part] for part in fused.parts if part in here]
                if kind == "bias":
                    specs = [spec for spec in specs if _has_bias(config, spec)]
                if specs:
                    name = f"{'layers' if hf else 'blk'}.{layer}.{fused.name_of(stored, kind)}"
                    found[name] = _pieces(config, layer, fused, specs, kind)
    return found


def _pieces(config: ModelConfig, layer: int, fused: FusedSpec, specs: Sequence[TensorSpec], kind: str) -> list[Piece]:
    """What a fused matrix of a layer, or its bias, is made of."""
    rows = [_shape(config, spec, layer)[0] for spec in specs]
    height, step = sum(rows), len(specs) if fused.interleaved else 1
    stacked = specs[0].per_expert
    pieces = []
    for expert in range(config.experts) if stacked else (-1,):
        first = max(expert, 0) * height
        for number, spec in enumerate(specs):
            name = f"layers.{layer}.{_in_layer(spec.hf, spec, kind, expert)}"
            begin = first + (number if fused.interleaved else sum(rows[:number]))
            transposed = fused.transposed and kind == "weight"
            pieces.append(Piece(name, begin, rows[number], step, height if stacked else 0, transposed))
    return pieces


def reads_mxfp4_pairs(config: ModelConfig) -> bool:
    """Whether safetensors files of this family may hold matrices as pairs of blocks and scales."""
    return ARCHITECTURES[config.architecture].hf_quantization == "mxfp4"


def without_layers(found: Mapping[str, Found], layers: int, more: int) -> dict[str, Found]:
    """What files hold by its name, without that of `more` layers behind the `layers` of the model.

    They predict further tokens from its output (GLM-4.5; Gloeckle et al. 2024, arXiv 2404.19737).
    """
    behind = tuple(f"{prefix}.{layer}." for prefix in ("layers", "blk") for layer in range(layers, layers + more))
    return {name: value for name, value in found.items() if not name.startswith(behind)}


def _shape(config: ModelConfig, spec: TensorSpec, layer: int) -> tuple[int, ...]:
    sizes = {
        "hidden": config.hidden,
        "mlp": config.mlp_columns(layer),
        "expert": config.expert_intermediate,
        "experts": config.experts,
        "heads": config.heads,
        "queries": config.heads * config.head_dim,
        "keys": config.kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "vocab": config.vocab,
    }
    return tuple(sizes[dimension] for dimension in spec.shape)


def _has_bias(config: ModelConfig, spec: TensorSpec) -> bool:
    return spec.bias is not None and bool(getattr(config, spec.bias))


def _tensors(config: ModelConfig) -> Iterator[ModelTensor]:
    def of(spec: TensorSpec, layer: int = -1, expert: int = -1) -> Iterator[ModelTensor]:
        shape = _shape(config, spec, layer)
        for kind in ("weight", "bias"):
            if kind == "bias" and not _has_bias(config, spec):
                continue
            hf, gguf = (_in_layer(name, spec, kind, expert) for name in (spec.hf, spec.gguf))
            if layer >= 0:
                hf, gguf = f"layers.{layer}.{hf}", f"blk.{layer}.{gguf}"
            yield ModelTensor(hf, gguf, shape if kind == "weight" else shape[:1], spec.part, layer, expert)

    yield from of(EMBEDDING)
    for layer in range(config.layers):
        for spec in layer_specs(config, layer).values():
            for expert in range(config.experts) if spec.per_expert else (-1,):
                yield from of(spec, layer, expert)
    yield from of(OUTPUT_NORM)
    if not config.tied_head:
        yield from of(HEAD)
