"""How inputs are made for one target: by coverage (atheris, over libFuzzer), or by changes of structure alone."""

from __future__ import annotations

import gc
import hashlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType, FunctionType
from typing import Any

from tests.fuzz.limits import MAX_WAIT_S, TooMuchError, bound_memory
from tests.fuzz.mutate import Mutator

FINDS = Path(__file__).parent / "finds"
FOUND = 77  # exit code after a find, libFuzzer's own
_MAX_BYTES = 1 << 20  # of an input
_MAX_CHANGES = 4


def by_coverage(name: str, corpus: Path, seconds: int) -> None:
    """Fuzz the target until it breaks or time is over. Does not return; a find is written into the folder `found` beside
    the corpus."""
    import atheris

    from tests.fuzz.targets import TARGETS

    # Not by the import of modules, which an editable install does in a way of its own.
    for function in [one for one in gc.get_objects() if isinstance(one, FunctionType)]:
        if str(function.__module__).partition(".")[0] == "tpimpi":
            atheris.instrument_func(function)
    target = TARGETS[name]
    random = Random()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random.seed(seed)
        if random.randrange(2):
            return atheris.Mutate(data, most)
        made = changed(bytes(data), target.mutate, random)
        return made if len(made) <= most else atheris.Mutate(data, most)

    _write_seeds(target.seeds(), corpus)
    found = corpus.parent.parent / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    bound_memory()
    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={MAX_WAIT_S:.0f}",
        "-rss_limit_mb=0",
        f"-max_len={_MAX_BYTES}",
    ]
    arguments += [f"-artifact_prefix={found}/", "-print_final_stats=1", "-reduce_inputs=1", "-len_control=0"]
    folders = [str(folder) for folder in (corpus, FINDS / name) if folder.is_dir()]
    atheris.Setup([sys.argv[0], *arguments, *folders], target, custom_mutator=mutate)
    atheris.Fuzz()


def by_structure(name: str, corpus: Path, seconds: float, seed: int | None = None) -> int:
    """Try changed inputs until one breaks the target or time is over; returns how many. A find is written into the folder
    `found` beside the corpus, and raised."""
    from tests.fuzz.targets import TARGETS

    target, random = TARGETS[name], Random(seed)
    _write_seeds(target.seeds(), corpus)
    inputs = [path.read_bytes() for path in sorted(corpus.iterdir()) if path.stat().st_size <= _MAX_BYTES]
    bound_memory()
    ends, count = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        data = changed(random.choice(inputs), target.mutate, random)
        count += 1
        try:
            _in_time(target, data)
        except BaseException:
            found = corpus.parent.parent / "found" / name
            found.mkdir(parents=True, exist_ok=True)
            (found / f"structure-{hashlib.sha1(data).hexdigest()[:12]}").write_bytes(data)
            raise
    return count


def changed(data: bytes, mutate: Mutator, random: Random) -> bytes:
    """An input with a few changes, of a bounded size."""
    for _ in range(random.randint(1, _MAX_CHANGES)):
        data = mutate(data, random)
        if len(data) > _MAX_BYTES:
            return data[:_MAX_BYTES]
    return data


def _in_time(target: Callable[[bytes], None], data: bytes) -> None:
    """Try an input, and end it where it takes too long."""

    def too_long(number: int, frame: FrameType | None) -> Any:
        raise TooMuchError(f"takes more than {MAX_WAIT_S:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, MAX_WAIT_S)
    try:
        target(data)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _write_seeds(seeds: list[bytes], corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
