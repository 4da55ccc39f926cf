"""Run on every rank: answers with and without speculation, of several models in one launch.

Arguments: a JSON file of folders of slices, where to write, and the slices of a model that drafts for the first one.
Rank 0 writes NAME-WINDOW.json for each: "plain" and "drafted", for the first also "model", each with the ids of several
answers and what their figures were; see `answers`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.engine.startup import open_engine
from tpimpi.star import Star, connect

TOKENS, CONTEXT = 48, 160


def answers(engine, star: Star, speculation) -> list[dict[str, object]]:
    """Greedy, with draws, ended by a token, cancelled, and turns that go on from each."""
    from tpimpi.serving.generate import GenerationFigures, HeldIds, generate
    from tpimpi.serving.sampling import make_sampler

    words = np.random.default_rng(2).integers(3, 90, (4, 8)).tolist()
    prompt, held, found = words[0] * 4 + words[1] + words[0], HeldIds(), []

    def answer(ids: list[int], stop: int | None = None, end_ids: tuple[int, ...] = (), **options: float) -> list[int]:
        asked, figures = 0, GenerationFigures()

        def going_on(rows: int) -> bool:
            nonlocal asked
            asked += rows == len(ids)
            return asked != stop

        sample = make_sampler(seed=4, **options)
        tokens = generate(
            *(engine.model, star, engine.embed, ids, sample),
            max_tokens=TOKENS,
            context=CONTEXT,
            end_ids=end_ids,
            held=held,
            going_on=going_on,
            speculation=speculation,
            figures=figures,
        )
        made = list(tokens)
        found.append({"ids": made, **asdict(figures)})
        return made

    greedy = answer(prompt)
    answer(prompt, temperature=1.2, repetition_penalty=1.1)
    for stop in (7, 8, 9, 10):
        cut = answer(prompt, stop=stop)
        answer([*prompt, *cut, *words[2]])
    for end in dict.fromkeys(greedy[5:20:3]):
        cut = answer(prompt, end_ids=(end,))
        answer([*prompt, *cut, *words[3]])
    return found


def draft_model(folder: str):
    """The model of these slices, for this rank alone."""
    from tpimpi.serving.draft_choice import ModelDrafts
    from tpimpi.serving.draft_model import DraftModel
    from tpimpi.serving.pass_times import PassTimes

    settings = EngineConfig(*(folder, None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], window="all")
    opened = open_engine(Star(None), settings)
    return ModelDrafts(DraftModel(opened, opened.header.config.vocab, CONTEXT), PassTimes())


def main() -> None:
    star, out = connect(), Path(sys.argv[2])
    folders = json.loads(Path(sys.argv[1]).read_text())
    for folder in folders:
        for window in ("all", 2):  # pinned, and streamed
            settings = EngineConfig(
                *(folder, None, "", "", "", "native", 1, "star", 60.0),
                cores_shared_by=[star.rank.size] * star.rank.size,
                window=window,
                kv_format="f32",
                chunk=16,
                draft=None,
            )
            memory = MemoryPlanner([open_engine(star, settings)]).plan(CONTEXT, None, 0).take()
            engine = memory.engines[0]
            if star.rank.is_hub:
                from tpimpi.serving.speculation import Speculation

                speculation = Speculation(memory.draft, always=True)
                ways = {"plain": None, "drafted": speculation}
                if folder == folders[0]:
                    ways["model"] = Speculation(memory.draft, always=True, model=draft_model(sys.argv[3]))
                found = {name: answers(engine, star, way) for name, way in ways.items()}
                if "model" in ways:
                    ways["model"].model.close()
                protocol.finish(engine.model, star)
                (out / f"{Path(folder).name}-{window}.json").write_text(json.dumps(found))
            else:
                protocol.follow([engine.model], star)
            memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
