"""Many prompts at once: each has the answer that it has alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import PROGRAMS
from tests.support.ranks import Ranks
from tests.support.tiny_models import slice_tiny

# Full and windowed layers, experts, sinks, queries and keys normed over all heads; streamed, or all in memory; and how many
# tokens are drafted; for the windowed one by the same model, on rank 0 alone, which reads half as many positions.
KINDS = {"llama": (2, 3), "gemma3": ("all", 3), "qwen3-moe": ("all", 0), "gpt-oss": (3, 2), "olmo2": (2, 0)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.slow_but("2")
def test_any_mixture_gives_each_prompt_its_answer_alone(on_ranks: Ranks, ranks: int, tmp_path: Path) -> None:
    """Of prompts that come at any time, of any length, beginning as others do, some of them cancelled, or failing."""
    jobs: list[tuple[str, int | str, int, str | None]] = []
    of_model = str(slice_tiny(tmp_path / "draft", "gemma3", 1))
    for kind, (window, draft) in KINDS.items():
        jobs.append((str(slice_tiny(tmp_path, kind, ranks)), window, draft, of_model if kind == "gemma3" else None))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    result = on_ranks(ranks, str(PROGRAMS / "many.py"), str(tmp_path / "jobs.json"), str(tmp_path))
    assert result.code == 0, result.err
    found = dict.fromkeys(("cached", "preempted", "cancelled", "failed", "drafted", "accepted", "continued"), 0)
    for kind in KINDS:
        did = json.loads((tmp_path / f"{kind}.json").read_text())
        for answer in did["answers"]:
            whole = answer["ended"] == "max_tokens"
            assert whole or answer["ended"] in ("cancelled", "failed")
            found["cancelled"] += answer["ended"] == "cancelled"
            found["failed"] += answer["ended"] == "failed"
            assert answer["ids"] == (answer["alone"] if whole else answer["alone"][: len(answer["ids"])]), kind
        assert did["units"] == did["filled"] == 0, kind
        # One call a tile, however many sequences a step has; experts are called for, each by itself.
        assert did["calls"][0] == did["calls"][1] or kind in ("qwen3-moe", "gpt-oss"), kind
        if kind == "gemma3":
            assert did["left"] == 0 and did["once"] > 1 and 0 < did["long"] < len(did["answers"])
            assert did["accepted"] > 0.8 * did["drafted"], "of a model that drafts for itself"
            assert all(passes <= max(1, tokens) for passes, tokens in did["passes"]), (
                "a pass a token, for all sequences"
            )
        for name in found:
            found[name] += did.get(name, 0)
    assert all(found.values()), f"a test that shows nothing: {found}"
