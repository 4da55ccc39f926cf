"""Read the rotary positions of a Hugging Face config.json: rope_theta and rope_scaling of old, rope_parameters of new files.

Meaning and defaults are those of transformers' modeling_rope_utils.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tpimpi.errors import ModelError
from tpimpi.models.architectures import Architecture
from tpimpi.models.config import ROPE_THETA
from tpimpi.models.keys import Keys, is_off, is_positive, show
from tpimpi.models.layer_spec import RopeScaling, yarn_attention_factor

_BESIDE_KEYS = ("rope_theta", "partial_rotary_factor")  # that older files have beside rope_scaling
_ALWAYS = frozenset({"rope_type", "type", *_BESIDE_KEYS})
_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS = {
    "default": _ALWAYS,
    "linear": _ALWAYS | {"factor"},
    "llama3": _ALWAYS | {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": _ALWAYS
    | {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": _ALWAYS | {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}
_QUERY_GROWTH_KEYS = {"llama_4_scaling_beta", "max_position_embeddings"}  # of Ministral 3; the second is not used


class HfRope(NamedTuple):
    """What a config.json says of its rotary positions, as fields of ModelConfig."""

    theta: float
    scaling: RopeScaling | None
    partial: float  # part of a head's elements that is rotated
    local_theta: float  # 0: none


def read_hf_rope(
    values: Mapping[str, Any], family: Architecture, context: int, head_dim: int, path: Path | str
) -> HfRope:
    """From the old layout (rope_theta, rope_scaling) or the new one (rope_parameters).

    As in transformers: rope_scaling or rope_parameters, and what stands inside goes before what stands beside. Raises
    ModelError where the two contradict each other, or hold what is not computed.
    """
    beside = {key: values[key] for key in _BESIDE_KEYS if values.get(key) is not None}
    beside = {"rope_theta": family.hf_defaults.get("rope_theta", ROPE_THETA), **beside}
    if "partial_rotary_factor" in family.hf_defaults:
        beside.setdefault("partial_rotary_factor", family.hf_defaults["partial_rotary_factor"])
    reader = _Reader(values, family, context, head_dim, path)
    local_theta = _local_theta(values, family, path) if family.hf_rope_by_layer else 0.0
    read = []
    for name in ("rope_scaling", "rope_parameters"):
        inside = values.get(name)
        if inside is not None and not isinstance(inside, dict):
            raise ModelError(f"{path}: {name} is {show(inside)}; a JSON object or null is needed")
        prefix = f"{name}."
        if inside and family.hf_rope_by_layer and name == "rope_parameters":
            inside, prefix = inside.get("full_attention"), f"{name}.full_attention."
            if inside is not None and not isinstance(inside, dict):
                raise ModelError(f"{path}: {prefix[:-1]} is {show(inside)}; a JSON object or null is needed")
        if inside:
            present = {key: value for key, value in inside.items() if value is not None}
            read.append(reader.read({**beside, **present}, prefix))
    if len(read) == 2 and read[0] != read[1]:
        raise ModelError(f"{path}: rope_scaling and rope_parameters say different things; remove the wrong one")
    theta, scaling, partial = read[0] if read else reader.read({**beside, **family.hf_default_rope}, "")
    return HfRope(theta, scaling, partial, local_theta)


def _local_theta(values: Mapping[str, Any], family: Architecture, path: Path | str) -> float:
    """The base of layers with a window, whose rope has no scaling."""
    whole = values.get("rope_parameters")
    inside = whole.get("sliding_attention") if isinstance(whole, dict) else None
    if isinstance(whole, dict):
        for key, value in whole.items():
            if key not in ("full_attention", "sliding_attention") and not is_off(value):
                raise ModelError(
                    f"{path}: key {show(f'rope_parameters.{key}')} is {show(value)}, which tpimpi does not know in a "
                    f"{family.name} model; 'full_attention' and 'sliding_attention' are needed"
                )
    default = family.hf_defaults.get("rope_local_base_freq", values.get("rope_theta"))
    if default is None:
        default = family.hf_defaults.get("rope_theta", ROPE_THETA)
    if not inside:
        return Keys(values, path).number("rope_local_base_freq", default=default)
    if not isinstance(inside, dict):
        raise ModelError(f"{path}: rope_parameters.sliding_attention is {show(inside)}; a JSON object is needed")
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind != "default" or any(key not in _ALWAYS - {"partial_rotary_factor"} for key in inside):
        raise ModelError(
            f"{path}: rope_parameters.sliding_attention is {show(inside)}; tpimpi computes only rope_type 'default' there"
        )
    prefix = "rope_parameters.sliding_attention."
    return Keys({prefix + key: value for key, value in inside.items()}, path, prefix).number(
        "rope_theta", default=default
    )


class _Reader:
    """Reads one object of rope parameters."""

    def __init__(
        self, values: Mapping[str, Any], family: Architecture, context: int, head_dim: int, path: Path | str
    ) -> None:
        self._values, self._family, self._path = values, family, path
        self._context, self._head_dim = context, head_dim

    def read(self, values: Mapping[str, Any], prefix: str) -> tuple[float, RopeScaling | None, float]:
        """Base, scaling, and part of a head."""
        kind = values.get("rope_type", values.get("type", "default"))
        if isinstance(kind, str):
            kind = self._family.hf_rope_names.get(kind, kind)
        if not isinstance(kind, str) or kind not in _ROPE_KEYS:
            raise ModelError(
                f"{self._path}: {prefix}rope_type is {show(kind)}, which tpimpi does not compute; it computes "
                f"{', '.join(_ROPE_KEYS)}"
            )
        known = _ROPE_KEYS[kind]
        if self._family.hf_query_growth:
            known = known | _QUERY_GROWTH_KEYS
        for key, value in values.items():
            if key not in known and not is_off(value):
                raise ModelError(
                    f"{self._path}: key {show(prefix + key)} is {show(value)}, which tpimpi does not know for rope_type "
                    f"'{kind}' and which may change the mathematics; remove it if the model does not need it"
                )
        keys = Keys({prefix + key: value for key, value in values.items()}, self._path, prefix)
        partial = self._partial(values)
        dims = int(self._head_dim * partial)
        return keys.number("rope_theta"), self._scaling(kind, keys, dims), partial

    def _partial(self, values: Mapping[str, Any]) -> float:
        partial = values.get("partial_rotary_factor", 1.0)
        if self._family.partial_rotary and is_positive(partial) and partial <= 1:
            return float(partial)
        if isinstance(partial, bool) or partial != 1:
            needed = "a part of 1" if self._family.partial_rotary else "tpimpi computes only 1 (the whole head)"
            raise ModelError(f"{self._path}: partial_rotary_factor is {show(partial)}; {needed}")
        return 1.0

    def _scaling(self, kind: str, keys: Keys, dims: int) -> RopeScaling | None:
        if kind == "default":
            return None
        if kind == "linear":
            return RopeScaling("linear", factor=keys.number("factor"))
        original = self._original(keys)
        if kind == "llama3":
            low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
            if not low < high:
                raise ModelError(
                    f"{self._path}: {keys.prefix}low_freq_factor is {low:g} and {keys.prefix}high_freq_factor is "
                    f"{high:g}; the first must be the smaller one"
                )
            return RopeScaling("llama3", keys.number("factor"), low, high, original)
        if kind == "yarn":
            return self._yarn(keys, original)
        factor = keys.number("factor", default=self._context / original)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        return RopeScaling(
            "longrope",
            original_context=original,
            factors=self._factors(keys, "short_factor", dims // 2),
            long_factors=self._factors(keys, "long_factor", dims // 2),
            attention_factor=keys.number("attention_factor", default=usual),
        )

    def _yarn(self, keys: Keys, original: int) -> RopeScaling:
        factor = keys.number("factor")
        values, prefix = keys.values, keys.prefix
        usual = yarn_attention_factor(factor)
        if values.get(f"{prefix}mscale") and values.get(f"{prefix}mscale_all_dim"):
            scales = (keys.number(name) for name in ("mscale", "mscale_all_dim"))
            above, below = (yarn_attention_factor(factor, scale) for scale in scales)
            usual = above / below
        growth = values.get(f"{prefix}llama_4_scaling_beta", 0)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_context=original,
            attention_factor=keys.number("attention_factor", default=usual),
            beta_fast=keys.number("beta_fast", default=32.0),
            beta_slow=keys.number("beta_slow", default=1.0),
            truncate=keys.flag("truncate", default=True),
            query_growth=keys.number("llama_4_scaling_beta") if growth else 0.0,
        )

    def _original(self, keys: Keys) -> int:
        """The context before it was extended; some families have it beside the rope's own keys, where it goes first."""
        if _ORIGINAL in self._family.hf_defaults or self._values.get(_ORIGINAL) is not None:
            return Keys(self._values, self._path).integer(_ORIGINAL, default=self._family.hf_defaults.get(_ORIGINAL))
        return keys.integer(_ORIGINAL, default=self._context)

    def _factors(self, keys: Keys, name: str, count: int) -> tuple[float, ...]:
        factors = keys.values.get(keys.prefix + name)
        if factors is None:
            raise ModelError(
                f"{self._path}: key '{keys.prefix}{name}' is missing, without which the model is not known"
            )
        if not isinstance(factors, list) or len(factors) != count or not all(map(is_positive, factors)):
            raise ModelError(
                f"{self._path}: {keys.prefix}{name} is {show(factors)}; {count} positive numbers are needed, half as many "
                f"as elements of a head are rotated"
            )
        return tuple(float(value) for value in factors)
