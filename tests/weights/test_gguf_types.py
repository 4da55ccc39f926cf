"""The table of GGML's types against the gguf package's."""

from __future__ import annotations

import gguf
import pytest

from tpimpi.weights.sources.gguf_types import type_of_name, type_of_number


def test_types_are_those_of_the_gguf_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in gguf.GGMLQuantizationType:
        assert (
            type_of_number(kind) == type_of_name(kind.name.lower()) == (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind])
        )
    assert type_of_number(4) is None and type_of_number(10_000) is None
    # One that a newer package knows, and we do not.
    monkeypatch.setattr("tpimpi.weights.sources.gguf_types._TYPES", {})
    assert type_of_number(gguf.GGMLQuantizationType.Q8_0) == ("q8_0", 32, 34)
