"""What a prompt begins with, and the ranks hold already, is not computed again, and changes no token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import PROGRAMS
from tests.support.ranks import Ranks
from tests.support.tiny_models import slice_tiny
from tpimpi.serving.generate import HeldIds

# Windows, rotary frequencies that depend on the context, experts, queries and keys normed over all heads.
KINDS = ("llama-bias", "gemma3", "phi3-long", "qwen3-moe", "gpt-oss", "olmo2")
LONGROPE = "phi3-long"  # whose frequencies are others for more than 32 positions


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow_but("2")
@pytest.mark.any_mpi
def test_a_turn_computes_what_is_new_and_gives_the_same_tokens(on_ranks: Ranks, ranks: int, tmp_path: Path) -> None:
    folders = []
    for kind in KINDS:
        folders.append(str(slice_tiny(tmp_path, kind, ranks)))
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    result = on_ranks(ranks, str(PROGRAMS / "prefixes.py"), str(tmp_path / "folders.json"), str(tmp_path))
    assert result.code == 0, result.err
    for kind in KINDS:
        turns = json.loads((tmp_path / f"{kind}.json").read_text())
        assert [turn["ids"] for turn in turns] == [turn["anew"] for turn in turns], kind
        # Of the prompt of 20 and half of the answer of 6, three; then of all that and 21 new ones.
        grown = 0 if kind == LONGROPE else 23
        assert [turn["kept"] for turn in turns] == [0, grown, 44 + 3, 29], kind
        for turn in turns:
            assert turn["rows"] == turn["noted"] == turn["prompt"] - turn["kept"] + 5, (kind, turn)


def test_ids_that_are_held_are_those_of_the_common_beginning() -> None:
    held = HeldIds([1, 2, 3, 4])
    assert (held.keep([1, 2, 3, 9, 4]), held.ids) == (3, [1, 2, 3])
    assert (held.keep([1, 2]), held.ids) == (2, [1, 2])
    assert (held.keep([1, 2, 3]), held.kept) == (2, 2)
    assert (held.keep(()), held.ids) == (0, [])
