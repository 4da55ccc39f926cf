"""A draft model of layers with windows, which holds no more than what it may have to take back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from tests.support.tiny_models import write_tiny_hf
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.startup import open_engine
from tpimpi.serving.draft_model import DraftModel
from tpimpi.star import Star
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

CONTEXT, LONG = 1900, 1700


def test_a_draft_is_the_same_whatever_was_read_before(tmp_path: Path) -> None:
    """Of a prompt that begins as a long one did, so far back that its windows are gone, and in less room."""
    with open_source(write_tiny_hf(tmp_path / "model", "gemma3", max_position_embeddings=2048)) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path / "s")
        vocab = source.config.vocab
    settings = EngineConfig(
        *(str(tmp_path / "s"), None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], window="all"
    )

    def model() -> DraftModel:
        return DraftModel(open_engine(Star(None), settings), vocab, CONTEXT)

    ids = np.random.default_rng(0).integers(3, vocab, LONG).tolist()
    prompts = [(CONTEXT, ids), (CONTEXT, [*ids[:100], *ids[300:400]]), (CONTEXT, ids), (1200, ids[:1100])]
    alone = []
    for context, prompt in prompts:
        with closing(model()) as fresh:
            fresh.begin(context)
            alone.append(fresh.propose(prompt, 5))
    with closing(model()) as drafting:
        for (context, prompt), wanted in zip(prompts, alone, strict=True):
            drafting.begin(context)
            assert drafting.propose(prompt, 5) == wanted
            assert drafting.propose([*prompt, wanted[0] + 1], 3), "it goes back by what was wrong"
    assert len(set(map(tuple, alone))) > 1
