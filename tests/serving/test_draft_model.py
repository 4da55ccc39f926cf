"""A draft model of layers with windows, which holds no more than what it may have to take back."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.support.tiny_models import slice_tiny, write_tiny_hf
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.serving.draft_model import BatchedDraftModel, DraftModel
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


def test_many_sequences_have_the_drafts_that_each_has_alone(tmp_path: Path) -> None:
    """In a pass a token, whatever was drafted for them before and was wrong; longer ones are read over several steps, and
    where pages are short some have none."""
    with open_source(write_tiny_hf(tmp_path / "model", "gemma3", max_position_embeddings=2048)) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path / "s")
        vocab = source.config.vocab
    settings = EngineConfig(
        *(str(tmp_path / "s"), None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], window="all", chunk=48
    )
    random, context = np.random.default_rng(2), 400
    texts = {key: random.integers(3, vocab, n).tolist() for key, n in (("a", 30), ("b", 7), ("c", 170), ("d", 120))}
    alone = DraftModel(open_engine(Star(None), settings), vocab, context)
    many = BatchedDraftModel(open_engine(Star(None), replace(settings, parallel=5)), vocab, context, 1)
    steps: list[int] = []
    step = many._step

    def counted(*arguments: Any) -> Any:
        steps.append(len(arguments[0]))
        return step(*arguments)

    many._step = counted  # type: ignore[method-assign]
    had = dict.fromkeys(texts, 0)
    with closing(alone), closing(many):
        for most in (4, 1, 6, 3, 5, 2, 4, 4, 3, 5):
            steps.clear()
            found = many.propose({key: (ids, most) for key, ids in texts.items()})
            assert len(steps) <= most and max(steps) > 1, "a pass a token, for all of them"
            for key, draft in found.items():
                alone.begin(context)
                assert draft == alone.propose(texts[key], most), key
                had[key] += 1
            for key, ids in texts.items():  # of the draft some are right, then come others
                right = found.get(key, [])[: random.integers(0, most + 1)]
                ids += [*right, *random.integers(3, vocab, random.integers(1, 4)).tolist()]
        assert had["b"] == 10 and 1 < had["c"] < had["d"] < 10, had  # 48 rows a step, for the shortest first
        texts["e"] = random.integers(3, vocab, 250).tolist()  # for which there are too few pages beside the others
        assert "e" not in many.propose({key: (ids, 2) for key, ids in texts.items()})
        many.keep(["e"])
        assert many.used == 0
        drafts = [many.propose({"e": (texts["e"], 2)}) for _ in range(6)]
        alone.begin(context)
        assert drafts[:5] == [{}] * 5 and drafts[5] == {"e": alone.propose(texts["e"], 2)}
        assert many.used > 0 and many.room(395) == 5 and many.room(400) == 0
        many.forget("e")
        assert many.used == 0


class Lender:
    """Of memory: what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def lend_to_draft(self) -> None:
        self.calls.append("lend")

    def take_back_from_draft(self) -> None:
        self.calls.append("take back")


def test_it_drafts_the_same_when_it_was_unloaded_and_loaded_again(tmp_path: Path) -> None:
    folder = slice_tiny(tmp_path, "llama-bias", 1)
    settings = EngineConfig(
        *(str(folder), None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], window="all"
    )
    opened = open_engine(Star(None), settings)
    vocab, lender = opened.header.config.vocab, Lender()
    ids = np.random.default_rng(1).integers(3, 90, 40).tolist()
    with closing(DraftModel(open_engine(Star(None), settings), vocab, 100)) as there:
        there.begin(100)
        wanted = there.propose(ids, 6)
        there.begin(43)
        assert (there.room(40), there.room(99)) == (3, 0)
        assert there.propose(ids, 6) == wanted[:3] and not there.propose([*ids, *wanted[:3]], 6)
    with closing(DraftModel(opened, vocab, 100, cast("RankMemory", lender))) as drafting:
        drafting.begin(100)
        assert drafting.leaves and not lender.calls
        for _ in range(2):
            drafting.load()
            assert drafting.seconds() == 0, "what it took before may be otherwise now"
            assert drafting.propose(ids, 6) == wanted and drafting.seconds() > 0
            drafting.begin(100)
            assert drafting.propose([*ids, *wanted[:2]], 4) == wanted[2:]
            drafting.unload()
            drafting.begin(100)
    assert lender.calls == ["lend", "take back"] * 2


def test_its_memory_is_that_of_tiles_until_it_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that streams; a run of set drafts has it loaded from the start, and one with room for both too."""
    monkeypatch.setattr("tpimpi.engine.memory_guard.resident_bytes", lambda: 0)  # what this process has otherwise
    folder = slice_tiny(tmp_path, "llama-bias", 1)
    settings = EngineConfig(
        *(str(folder), None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], draft=None
    )

    def planner(draft: int | None = None) -> MemoryPlanner:
        engines = [open_engine(Star(None), replace(settings, draft=of)) for of in (draft, 0)]
        return MemoryPlanner(engines[:1], draft_engine=engines[1])

    with ExitStack() as stack:

        def memory(promise_beyond: int, draft: int | None = None) -> RankMemory:
            planned = planner(draft)
            stack.callback(planned.draft_engine.close)  # type: ignore[union-attr]
            taken = planned.plan(100, planned.needs(100).least + promise_beyond, 0).take()
            stack.callback(taken.close)
            return taken

        whole = planner()
        tiles = whole.engines[0].tile_bytes
        of_draft = whole.draft_bytes(100)
        assert of_draft > tiles
        assert not memory(4 * tiles).draft_waits and not memory(0, 4).draft_waits
        streaming = memory(0)
        assert streaming.draft_waits
        window = streaming.engines[0].window
        pinned = window.wanted_bytes
        streaming.lend_to_draft()
        assert not streaming.draft_waits and window.wanted_bytes < pinned
        streaming.take_back_from_draft()
        now = time.monotonic()
        for later in (0.0, 60.0):
            streaming.guard.look(now + later)
        assert streaming.draft_waits and window.wanted_bytes == pinned


def test_tiles_give_up_its_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host's free memory bounds them: at once, as the draft model is about to take it, and until it is back."""
    monkeypatch.setattr("tpimpi.engine.memory_guard.resident_bytes", lambda: 0)
    monkeypatch.setattr("tpimpi.engine.memory_guard.headroom", lambda of: 1 << 40)
    path = write_tiny_hf(tmp_path / "model", "llama-bias", num_hidden_layers=16)
    (path / "tokenizer.json").write_text("{}")
    with open_source(path) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path / "deep")
    engines = [
        open_engine(
            Star(None),
            EngineConfig(*(str(folder), None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], draft=draft),
        )
        for folder, draft in ((tmp_path / "deep", None), (slice_tiny(tmp_path, "llama-bias", 1), 0))
    ]
    planner = MemoryPlanner(engines[:1], draft_engine=engines[1])
    tiles, of_draft = engines[0].tile_bytes, planner.draft_bytes(100)
    planned = planner.plan(100, planner.needs(100).least + tiles // 2, 1)
    with closing(engines[1]), closing(planned.take()) as memory:
        window, later = memory.engines[0].window, time.monotonic()

        def rest() -> None:
            nonlocal later
            for _ in range(3):
                later += 60.0
                memory.guard.look(later)

        assert memory.draft_waits
        rest()
        assert window.wanted_bytes == tiles
        memory.lend_to_draft()
        beside = window.wanted_bytes
        assert tiles - of_draft - tiles // 16 <= beside <= tiles - of_draft
        rest()
        assert window.wanted_bytes == beside, "it is the draft model's, which has not come yet"
        memory.make_room(150)
        memory.make_room(100)
        rest()
        assert window.wanted_bytes == beside
        memory.take_back_from_draft()
        rest()
        assert window.wanted_bytes == tiles
