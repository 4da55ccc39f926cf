"""Which weight format each matrix of a model is stored in: a matrix's own choice, since models mix them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from tpimpi.compute.formats import FORMATS, WEIGHT_FORMATS
from tpimpi.errors import shorten
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import layer_specs

# llama.cpp's mixes of K-quants, and the format of most of their matrices; in every third layer, and in the first and last
# eighths, v and down are q6_k, as is the head (llama-quant.cpp, as of 2026).
MIXES = {"mxfp4_moe": "mxfp4", "q4_k_m": "q4_k", "q5_k_m": "q5_k"}
EXPERTS_MIX = "mxfp4_moe"  # as OpenAI publishes gpt-oss: experts as mxfp4, all else in bf16
_EXPERTS_OF_MIXTRAL = 8  # with as many, llama.cpp gives attention, of which there is little, more bits
ROUTER_FORMATS = ("f32", "bf16")
FORMAT_CHOICES = (*WEIGHT_FORMATS, *MIXES)  # what `--format` takes beside auto


class LayerFormats(NamedTuple):
    """The format of each matrix of a layer; "" of one that it has not.

    gate, up and down are of what every position goes through: a dense block, or shared experts.
    """

    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str
    expert_gate: str = ""
    expert_up: str = ""
    expert_down: str = ""

    def present(self) -> dict[str, str]:
        """The formats of the matrices that there are, by part."""
        return {part: fmt for part, fmt in self._asdict().items() if fmt}


_DENSE_PARTS = 7  # of LayerFormats


@dataclass(frozen=True)
class ModelFormats:
    """The format of every matrix of a model."""

    layers: tuple[LayerFormats, ...]
    head: str
    embedding: str
    router: str = "f32"  # or bf16: routers are kept as they are

    @classmethod
    def of(cls, fmt: str, layers: int) -> ModelFormats:
        """What `--format` asks for, of a dense model of so many layers: every matrix in `fmt`, but head and embedding in its
        `head_format`; or a mix."""
        if fmt == EXPERTS_MIX:
            return cls((LayerFormats(*["bf16"] * _DENSE_PARTS),) * layers, "bf16", "bf16")
        if fmt in MIXES:
            main = LayerFormats(*[MIXES[fmt]] * _DENSE_PARTS)
            more = main._replace(v="q6_k", down="q6_k")
            return cls(tuple(more if _has_more_bits(i, layers) else main for i in range(layers)), "q6_k", "q6_k")
        outer = FORMATS[fmt].head_format or fmt
        return cls((LayerFormats(*[fmt] * _DENSE_PARTS),) * layers, outer, outer)

    @classmethod
    def for_model(cls, fmt: str, config: ModelConfig, router: str = "f32") -> ModelFormats:
        """The same for any model; an expert's matrices as those of a dense layer.

        But mxfp4_moe has experts in mxfp4, all else in bf16, and q4_k_m of eight experts k and v in q8_0, o in q5_k.
        """
        dense, layers = cls.of(fmt, config.layers), []
        more = {"k": "q8_0", "v": "q8_0", "o": "q5_k"}
        for layer, usual in enumerate(dense.layers):
            here = usual._replace(**more) if fmt == "q4_k_m" and config.experts == _EXPERTS_OF_MIXTRAL else usual
            of_experts = MIXES[fmt] if fmt == EXPERTS_MIX else ""
            experts = {f"expert_{part}": of_experts or getattr(here, part) for part in ("gate", "up", "down")}
            specs = layer_specs(config, layer)
            formats = {**here._asdict(), **experts}
            layers.append(LayerFormats(**{part: form if part in specs else "" for part, form in formats.items()}))
        return cls(tuple(layers), dense.head, dense.embedding, router)

    def layer_formats(self) -> set[str]:
        """The formats that matrices of layers have."""
        return {fmt for formats in self.layers for fmt in formats.present().values()}

    def describe(self) -> str:
        """A short text: "bf16", or "q4_1, v q8_0 in 8 layers, head q8_0". An embedding that is not named is as the head."""
        by_part = zip(*self.layers, strict=True)
        counts = {part: Counter(formats) for part, formats in zip(LayerFormats._fields, by_part, strict=True)}
        # Experts are most of a mixture.
        main_parts = [part for part in counts if part.startswith("expert") and any(filter(None, counts[part]))]
        whole = sum((counts[part] for part in main_parts or counts), Counter[str]())
        main = max(WEIGHT_FORMATS, key=lambda fmt: whole[fmt])
        words = [main]
        for part, found in counts.items():
            for fmt in WEIGHT_FORMATS:
                if fmt != main and found[fmt]:
                    some = f" in {found[fmt]} layer{'s' if found[fmt] > 1 else ''}"
                    words.append(f"{part} {fmt}{some if found[fmt] < found.total() - found[''] else ''}")
        if self.head != main:
            words.append(f"head {self.head}")
        if self.embedding != self.head:
            words.append(f"embedding {self.embedding}")
        return ", ".join(words)

    def key(self) -> str:
        """A text for a file name, another for each other choice: "bf16", "q4_1-head-q8_0", or with a hash at the end."""
        text = self.describe().replace(", ", "-").replace(" ", "-")
        by_part = zip(*self.layers, strict=True)
        if all(len({*formats} - {""}) <= 1 for formats in by_part):
            return text
        return f"{text.split('-')[0]}-mixed-{xxhash.xxh3_64_hexdigest(repr(self).encode())}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: runs of layers that are alike, `[count, {part: format}]`, the head and the embedding."""
        runs = [[len(list(alike)), formats.present()] for formats, alike in itertools.groupby(self.layers)]
        router = {"router": self.router} if self.router != "f32" else {}
        return {"layers": runs, "head": self.head, "embedding": self.embedding, **router}

    @classmethod
    def from_dict(cls, values: Any, layers: int) -> ModelFormats:
        """Undo `to_dict`, for a model of so many layers. ValueError, KeyError or TypeError for anything else."""
        found: list[LayerFormats] = []
        for count, formats in values["layers"]:
            if type(count) is not int or not 0 < count <= layers - len(found):
                raise ValueError(f"formats of {layers} layers do not have a run of {shorten(str(count))}")
            found += [LayerFormats(**{**dict.fromkeys(LayerFormats._fields[:_DENSE_PARTS], ""), **formats})] * count
        made = cls(tuple(found), values["head"], values["embedding"], values.get("router", "f32"))
        if len(found) != layers:
            raise ValueError(f"formats of {len(found)} layers, must be of {layers}")
        if made.router not in ROUTER_FORMATS:
            raise ValueError(f"the router's format is {shorten(str(made.router))!r}, must be f32 or bf16")
        for fmt in {*made.layer_formats(), made.head, made.embedding}:
            if fmt not in WEIGHT_FORMATS:
                raise ValueError(
                    f"format is {shorten(str(fmt))!r}, must be {', '.join(WEIGHT_FORMATS[:-1])} or {WEIGHT_FORMATS[-1]}"
                )
        if made.to_dict() != values:
            raise ValueError("formats are not as they are written")
        return made


def _has_more_bits(layer: int, layers: int) -> bool:
    """Whether a mix has more bits for v and down in this layer."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
