"""Read the rotary positions' scaling of a GGUF file: its metadata below "<arch>.rope.scaling.", and its tensors of factors.

Meaning and defaults are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tpimpi.errors import ModelError
from tpimpi.models.keys import Keys, is_positive, show
from tpimpi.models.layer_spec import RopeScaling, yarn_attention_factor

_KINDS = ("none", "linear", "yarn", "longrope")


class GgufRope:
    """What a file says of its rotary positions; `dims` elements of a head are rotated.

    `truncate`: yarn interpolates between whole elements, which no key says.
    """

    def __init__(self, keys: Keys, context: int, dims: int, *, truncate: bool = True) -> None:
        self._keys, self._context, self._dims, self._truncate = keys, context, dims, truncate

    def scaling(self, tensors: Mapping[str, Sequence[float]]) -> RopeScaling | None:
        """The scaling, with the tensors `rope_freqs` ("factors"), `rope_factors_short` and `rope_factors_long`."""
        keys = self._keys
        kind_key, factor_key = (f"{keys.prefix}rope.scaling.{name}" for name in ("type", "factor"))
        kind = keys.values.get(kind_key)
        if kind is not None and kind not in _KINDS:
            raise ModelError(
                f"{keys.path}: {kind_key} is {show(kind)}, which tpimpi does not compute; it computes {', '.join(_KINDS)}"
            )
        # rope.scale_linear is its name in files of 2023; to llama.cpp 0 is "not scaled", and no type is linear.
        factor = keys.values.get(factor_key, keys.values.get(f"{keys.prefix}rope.scale_linear", 1.0))
        if kind == "none" or (not isinstance(factor, bool) and factor == 0):
            factor = 1.0
        if not is_positive(factor):
            raise ModelError(f"{keys.path}: {factor_key} is {show(factor)}; a positive number is needed")
        factors = tensors.get("factors")
        if kind == "yarn":
            return self._yarn(float(factor), factors)
        if kind == "longrope" or "short" in tensors or "long" in tensors:
            for name in ("short", "long"):
                if name not in tensors:
                    raise ModelError(
                        f"{keys.path}: tensor rope_factors_{name}.weight is missing; download the file again"
                    )
            return self._longrope(tensors["short"], tensors["long"])
        if factors is not None:
            self._check(factors, "rope_freqs.weight")
            return RopeScaling("factors", factors=tuple(float(value) * float(factor) for value in factors))
        return RopeScaling("linear", factor=float(factor)) if factor != 1 else None

    def _yarn(self, factor: float, factors: Sequence[float] | None) -> RopeScaling:
        keys = self._keys
        if factors is not None:
            raise ModelError(
                f"{keys.path}: holds tensor rope_freqs.weight, and rope.scaling.type is 'yarn'; one of them is needed"
            )
        attention = yarn_attention_factor(factor)
        log_multiplier = keys.values.get(f"{keys.prefix}rope.scaling.yarn_log_multiplier")
        if log_multiplier:
            attention /= yarn_attention_factor(factor, keys.number("rope.scaling.yarn_log_multiplier"))
        growth = keys.values.get(f"{keys.prefix}attention.temperature_scale")
        return RopeScaling(
            "yarn",
            factor=factor,
            original_context=self._original(),
            attention_factor=keys.number("rope.scaling.yarn_attn_factor", default=attention)
            * keys.number("rope.scaling.attn_factor", default=1.0),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
            truncate=self._truncate,
            query_growth=keys.number("attention.temperature_scale") if growth else 0.0,
        )

    def _longrope(self, short: Sequence[float], long: Sequence[float]) -> RopeScaling:
        self._check(short, "rope_factors_short.weight")
        self._check(long, "rope_factors_long.weight")
        return RopeScaling(
            "longrope",
            original_context=self._original(),
            factors=tuple(map(float, short)),
            long_factors=tuple(map(float, long)),
            attention_factor=self._keys.number("rope.scaling.attn_factor", default=1.0),
        )

    def _original(self) -> int:
        return self._keys.integer("rope.scaling.original_context_length", default=self._context)

    def _check(self, factors: Sequence[float], tensor: str) -> None:
        if len(factors) != self._dims // 2:
            raise ModelError(
                f"{self._keys.path}: tensor {tensor} has {len(factors)} numbers; "
                f"{self._dims // 2} (half the {self._dims} elements of a head that are rotated) are needed"
            )
        for value in factors:
            if not is_positive(value):
                raise ModelError(f"{self._keys.path}: tensor {tensor} holds {value}; positive numbers are needed")
