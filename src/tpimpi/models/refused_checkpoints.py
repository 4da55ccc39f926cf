"""Checkpoints that tpimpi does not read, refused by name: quantized ones, and those whose config contradicts itself.

Names of methods are those of transformers' `quantization_config.quant_method`; tensors are known by the names that the
methods' own libraries give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tpimpi.errors import ModelError
from tpimpi.models.keys import is_off, show

TAKE_INSTEAD = "take the model's original safetensors (bf16 or f16), or a GGUF file of it (Q4_K_M or Q8_0, say)"

_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8, E4M3",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_NOTES_OF_TENSORS = (
    (".weight_scale_inv", "FP8, E4M3 with a scale for each block"),
    (".weight_packed", "compressed-tensors"),
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".q_weight", "EXL2"),
    (".trellis", "EXL3"),
    (".weight_scale", "FP8 or compressed-tensors"),
    (".scales", "MLX, or another of integers with scales"),
)
_ROPE_BESIDE = ("rope_theta", "partial_rotary_factor")


class _Place(NamedTuple):
    """Where an object of rope parameters stands in config.json, and which keys beside it say the same."""

    name: str
    inside: Mapping[str, Any]
    beside: Mapping[str, str]


def refuse_quantized(values: Mapping[str, Any], path: Path | str, read: str = "") -> None:
    """Raise ModelError where config.json says that the weights are quantized, by the method's name; `read` is one that is
    read."""
    found = values.get("quantization_config")
    if found and not (read and isinstance(found, dict) and found.get("quant_method") == read):
        raise ModelError(
            f"{path}: quantization_config says the weights are quantized ({_described(found)}), which tpimpi does not "
            f"read; {TAKE_INSTEAD}"
        )
    if isinstance(mlx := values.get("quantization"), dict) and mlx:
        raise ModelError(
            f"{path}: quantization says the weights are quantized (MLX{_bits(mlx)}), which tpimpi does not read; "
            f"{TAKE_INSTEAD}"
        )


def refuse_quantized_tensors(names: Iterable[str], path: Path | str) -> None:
    """Raise ModelError where tensors of a safetensors file are those of a quantized checkpoint, whatever its config says."""
    names = list(names)
    for ending, method in _NOTES_OF_TENSORS:
        for name in names:
            if name.endswith(ending):
                raise ModelError(
                    f"{path}: tensor {show(name)} is one of a quantized checkpoint ({method}), which tpimpi does not "
                    f"read; {TAKE_INSTEAD}"
                )


def refuse_rope_contradictions(values: Mapping[str, Any], path: Path | str) -> None:
    """Raise ModelError where rope parameters inside an object are other ones than the same keys beside it."""
    for place in _rope_places(values):
        for inside, beside in place.beside.items():
            ours, theirs = place.inside.get(inside), values.get(beside)
            if ours is not None and theirs is not None and ours != theirs:
                raise ModelError(
                    f"{path}: {place.name}.{inside} is {show(ours)} and {beside} is {show(theirs)}; remove the wrong one"
                )


def _rope_places(values: Mapping[str, Any]) -> list[_Place]:
    same = {key: key for key in _ROPE_BESIDE}
    found = {name: values.get(name) for name in ("rope_scaling", "rope_parameters")}
    places = [_Place(name, inside, same) for name, inside in found.items() if isinstance(inside, dict)]
    of_layers = found["rope_parameters"] if isinstance(found["rope_parameters"], dict) else {}
    for kind, beside in (("full_attention", same), ("sliding_attention", {"rope_theta": "rope_local_base_freq"})):
        if isinstance(inside := of_layers.get(kind), dict):
            places.append(_Place(f"rope_parameters.{kind}", inside, beside))
    return places


def _described(found: Any) -> str:
    """The method, and what of it tells one file from another."""
    if not isinstance(found, dict):
        return show(found)
    method = found.get("quant_method")
    if method is None and "bits" in found and "group_size" in found:
        return f"MLX{_bits(found)}"
    name = _METHODS.get(method) if isinstance(method, str) else None
    details = f"{show(method)}{f': {name}' if name else ''}{_bits(found)}"
    if isinstance(block := found.get("weight_block_size"), list) and block:
        details += f" with a scale for each block of {' x '.join(map(show, block))}"
    if method == "compressed-tensors" and isinstance(kind := found.get("format"), str):
        details += f", {show(kind)}"
    if method == "bitsandbytes":
        details += ", 4 bits" if found.get("load_in_4bit") or found.get("_load_in_4bit") else ", 8 bits"
    return details


def _bits(found: Mapping[str, Any]) -> str:
    bits = found.get("bits")
    return "" if is_off(bits) else f", {show(bits)} bits"
