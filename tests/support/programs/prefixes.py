"""Run on every rank: turns whose beginnings the turn before has computed, of several models in one launch.

Arguments: a JSON file of folders of slices, and where to write. Rank 0 writes NAME.json for each: a list of turns with
"ids" (those generated with what was held), "anew" (those generated with nothing held), "kept", "rows" (that went through
rank 0's layers), "noted" (what HeldIds says of them) and "prompt" (its length).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.engine.startup import open_engine
from tpimpi.star import Star, connect

CONTEXTS = (32, 128, 128, 48)  # of each turn: the cache grows, stays, and becomes smaller
TOKENS = 6


def talk(engine, star: Star) -> list[dict[str, object]]:
    from tpimpi.serving.generate import HeldIds, generate

    model, rows = engine.model, []
    forward = model.forward
    model.forward = lambda x, start, **more: rows.append(len(x)) or forward(x, start, **more)

    def answer(prompt: list[int], context: int, held: HeldIds) -> list[int]:
        rows.clear()
        tokens = generate(
            *(model, star, engine.embed, prompt, lambda logits, history: int(np.argmax(logits))),
            max_tokens=TOKENS,
            context=context,
            end_ids=(),
            held=held,
        )
        return list(tokens)

    random, held, turns, prompts = np.random.default_rng(1), HeldIds(), [], []
    for number, context in enumerate(CONTEXTS):
        new = random.integers(3, 90, 20).tolist()
        if not number:
            prompt = new
        elif number < 3:  # what was asked, half of the answer, and then something else than the rest of it
            before, said = prompts[-1], turns[-1]["ids"]
            prompt = [*before, *said[:3], said[3] + 1 if said[3] < 50 else said[3] - 1, *new]
        else:  # the same once more, cut short
            prompt = prompts[-1][:30]
        prompts.append(prompt)
        ids = answer(prompt, context, held)
        turns.append(
            {
                "ids": ids,
                "kept": held.kept,
                "rows": sum(rows),
                "noted": len(held.ids) - held.kept,
                "prompt": len(prompt),
            }
        )
    for turn, prompt, context in zip(turns, prompts, CONTEXTS, strict=True):
        turn["anew"] = answer(prompt, context, HeldIds())
    return turns


def main() -> None:
    star, out = connect(), Path(sys.argv[2])
    for folder in json.loads(Path(sys.argv[1]).read_text()):
        settings = EngineConfig(
            *(folder, None, "", "", "", "native", 1, "star", 60.0),
            cores_shared_by=[star.rank.size] * star.rank.size,
            window="all",
            kv_format="f32",
            chunk=16,
        )
        memory = MemoryPlanner([open_engine(star, settings)]).plan(128, None, 0).take()
        model = memory.engines[0].model
        if star.rank.is_hub:
            turns = talk(memory.engines[0], star)
            protocol.finish(model, star)
            (out / f"{Path(folder).name}.json").write_text(json.dumps(turns))
        else:
            protocol.follow([model], star)
        memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
