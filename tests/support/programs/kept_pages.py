"""Run on every rank: a conversation whose keys and values are kept in files between two of its turns, of several models.

Arguments: a JSON file of [folder of slices, format of the cache], and where to write. To the files of the first all is
done that there is. For each, rank 0 writes NAME.json: a
list of what became of the second turn, each with "what" had been done to the files, the "problem" that was said, how many
ids were "there", the "ids" that were generated, and the "rows" that went through rank 0's layers. The first is "anew": with
nothing kept.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.engine.startup import open_engine
from tpimpi.serving.generate import HeldIds, generate
from tpimpi.serving.kept_cache import KeptCache
from tpimpi.serving.transcript import Turn
from tpimpi.star import connect

CONTEXT, TOKENS, PROMPT, NEW = 128, 6, 70, 10  # so that there are two pages


class Talk:
    """Rank 0's part: the first turn, and then the second, again and again."""

    def __init__(self, engine, files, session: Path) -> None:
        self.model, self.embed, self.files, self.rows = engine.model, engine.embed, files, []
        forward = self.model.forward
        self.model.forward = lambda x, start, **more: self.rows.append(len(x)) or forward(x, start, **more)
        random = np.random.default_rng(1)
        prompt, self.other, new = (random.integers(3, 90, n).tolist() for n in (PROMPT, PROMPT + 20, NEW))
        self.turn = Turn("", prompt, 0)
        self.conversation = SimpleNamespace(path=session, turns=[self.turn], passphrase=None, seal=None)
        self.turn.tokens = self.answer(prompt, HeldIds())
        self.second = [*prompt, *self.turn.tokens, *new]
        self.found: list[dict[str, object]] = []
        self.whole: dict[Path, bytes] = {}  # the files, and the key

    def answer(self, prompt: list[int], held: HeldIds) -> list[int]:
        self.rows.clear()
        tokens = generate(
            *(self.model, self.model.star, self.embed, prompt, lambda logits, history: int(np.argmax(logits))),
            max_tokens=TOKENS,
            context=CONTEXT,
            end_ids=(),
            held=held,
        )
        return list(tokens)

    def keep_first(self) -> list[Path]:
        """Keep the first turn's; returns the files."""
        kept = KeptCache(self.conversation)
        assert kept.take(self.model, self.files, CONTEXT, CONTEXT) == ([], None), "before anything was kept"
        self.answer(self.turn.ids, held := HeldIds())
        assert kept.keep(self.model, self.files, held.ids) is None
        cache = self.model.cache
        in_clear = [cache.page(kind, 0).tobytes()[:64] for kind in (0, 1) if cache.page(kind, 0).any()]
        self.found.append({"what": "anew", "ids": self.answer(self.second, HeldIds())})
        paths = sorted(self.files.folder.iterdir())
        assert len(paths) == self.model.star.rank.size and {path.stat().st_mode & 0o777 for path in paths} == {0o600}
        for path in [*paths, kept.path]:
            text = self.whole[path] = path.read_bytes()
            assert in_clear and not any(some in text for some in in_clear), "keys and values in clear"
            assert not re.search(rb"%d, ?%d" % tuple(self.turn.ids[:2]), text), "ids in clear"
        return paths

    def again(self, what: str, limit: int = CONTEXT) -> None:
        """The second turn, in another run after `what` was done to the files; then all is well again."""
        self.answer(self.other, HeldIds())
        ids, problem = KeptCache(self.conversation).take(self.model, self.files, min(limit, CONTEXT), limit)
        assert ids == [*self.turn.ids, *self.turn.tokens][: len(ids)]
        made = self.answer(self.second, HeldIds(list(ids)))
        self.found.append({"what": what, "problem": problem, "there": len(ids), "ids": made, "rows": sum(self.rows)})
        for path, text in self.whole.items():
            path.write_bytes(text)

    def damage(self, path: Path) -> None:
        text = self.whole[path]
        for at in (text.index(b"\n") + 3, len(text) // 2, len(text) - 1):
            path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
            self.again("damaged")
        for what, changed in (
            ("half", text[: len(text) // 2]),
            ("positions", text.replace(b'"positions":75', b'"positions":74')),
            ("shares", text.replace(b'"shares":"', b'"shares":"9,')),
            ("model", text.replace(b'"fingerprint":"', b'"fingerprint":"0')),
            ("nonsense", b"[" * 5000),
            ("no text", text.replace(b'"fingerprint":"', b'"fingerprint":"\xff')),
        ):
            assert changed != text
            path.write_bytes(changed)
            self.again(what)
        path.unlink()
        self.again("removed")

    def keep_second(self, paths: list[Path]) -> None:
        """Under the same name and another key: what was written before is of no use any more."""
        self.answer(self.second, held := HeldIds())
        self.conversation.turns.append(Turn("", self.second, 0, self.found[0]["ids"]))
        kept = KeptCache(self.conversation)
        assert kept.keep(self.model, self.files, held.ids) is None
        assert sorted(self.files.folder.iterdir()) == paths and kept.path.read_bytes() != self.whole[kept.path]
        ids, problem = KeptCache(self.conversation).take(self.model, self.files, CONTEXT, CONTEXT)
        assert (len(ids), problem) == (len(self.second) + TOKENS - 1, None)
        paths[0].write_bytes(self.whole[paths[0]])
        self.again("before")

    def fail_to_keep(self, paths: list[Path]) -> None:
        """On one rank, which changes nothing on any."""
        self.whole |= {path: path.read_bytes() for path in self.whole}
        in_the_way = self.files.folder / f".{paths[-1].name}.partial"
        in_the_way.mkdir()
        self.answer(self.turn.ids, held := HeldIds())
        problem = KeptCache(self.conversation).keep(self.model, self.files, held.ids[:-1])
        assert problem is not None and "Is a directory" in problem, problem
        in_the_way.rmdir()
        until = time.monotonic() + 10  # other ranks remove theirs at the same time
        while (left := sorted(self.files.folder.iterdir())) != paths and time.monotonic() < until:
            time.sleep(0.01)
        assert left == paths, "something was left behind"
        assert all(path.read_bytes() == text for path, text in self.whole.items())


def talk(engine, files, session: Path, *, everything: bool) -> list[dict[str, object]]:
    case = Talk(engine, files, session)
    paths = case.keep_first()
    case.again("nothing")
    if not everything:
        return case.found
    case.again("less room", PROMPT - 2)
    for path in paths[-2:]:
        case.damage(path)
    if len(paths) > 1:
        shutil.copy(paths[0], paths[1])
        case.again("another rank's")
    case.turn.tokens[-2] += 1
    case.again("another answer")
    case.turn.tokens[-2] -= 1
    KeptCache(case.conversation).path.write_text('{"tpimpi cache": 1}')
    case.again("key damaged")
    case.keep_second(paths)
    case.fail_to_keep(paths)
    return case.found


def main() -> None:
    star, out = connect(), Path(sys.argv[2])
    for number, (folder, kv) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        settings = EngineConfig(
            *(folder, None, "", "", "", "native", 1, "star", 60.0),
            cores_shared_by=[star.rank.size] * star.rank.size,
            window="all",
            kv_format=kv,
            chunk=16,
            keep_cache=str(out / "disks" / str(number)),
        )
        opened = open_engine(star, settings)
        memory = MemoryPlanner([opened]).plan(CONTEXT, None, 0).take()
        model = memory.engines[0].model
        if star.rank.is_hub:
            found = talk(memory.engines[0], opened.page_files, out / f"session-{number}", everything=not number)
            protocol.finish(model, star)
            (out / f"{Path(folder).name}.json").write_text(json.dumps(found))
        else:
            protocol.follow([model], star, opened.page_files)
        memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
