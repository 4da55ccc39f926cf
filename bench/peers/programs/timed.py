"""What the programs share: arguments, the clock, and the line of JSON at the end. Needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

# generate(prompt, n, on_token): n greedy tokens after the prompt, from an empty cache; on_token(id) as soon as each is there
Generate = Callable[[Sequence[int], int, Callable[[int], None]], None]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every program has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--prompt-ids", type=_ids, required=True, metavar="'1 2 3'")
    made.add_argument("--tokens", type=int, required=True, help="to generate, at least 1")
    made.add_argument("--threads", type=int, required=True)
    made.add_argument("--context", type=int, required=True, help="positions to keep room for")
    return made


def _ids(text: str) -> list[int]:
    if not (ids := [int(word) for word in text.split()]):
        raise argparse.ArgumentTypeError("has no token ids")
    return ids


def report(
    load: Callable[[], Generate], options: argparse.Namespace, distributions: Sequence[str], **more: object
) -> None:
    """Load, generate, prompt once more, and print the figures; times in seconds, memory in bytes.

    s_per_token is the median of the steps after the first token, null where there is none.
    """
    start = time.perf_counter()
    generate = load()
    load_s = time.perf_counter() - start
    token_ids, times = _run(generate, options.prompt_ids, options.tokens)
    warm = _run(generate, options.prompt_ids, 1)[1]
    steps = [after - before for before, after in pairwise(times)]
    figures: dict[str, Any] = {
        "load_s": load_s,
        "ttft_s": times[0],
        "ttft_warm_s": warm[0],
        "s_per_token": median(steps) if steps else None,
        "token_ids": token_ids,
        "peak_rss_bytes": peak_rss(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in distributions}},
        **more,
    }
    print(f"\n{json.dumps(figures)}", flush=True)


def _run(generate: Generate, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """The token ids, and when each was there, in seconds after the prompt was handed over."""
    ids: list[int] = []
    times: list[float] = []

    def on_token(token: int) -> None:
        times.append(time.perf_counter() - start)
        ids.append(int(token))

    start = time.perf_counter()
    generate(prompt, tokens, on_token)
    if len(ids) != tokens:
        raise RuntimeError(f"{len(ids)} tokens came, must be {tokens}")
    return ids, times


def peak_rss() -> int:
    """Bytes that were ever resident. (getrusage would count what the parent had before it started this program.)"""
    return _status("VmHWM")


def anonymous() -> int:
    """Bytes of the process that no file backs, now."""
    return _status("RssAnon")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
