"""`cache`: lists the slices that runs have put into this host's cache folder, and removes them."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tpimpi.cli.parser import Parser
from tpimpi.cli.process import Job, say
from tpimpi.cli.run_options import parsed_into
from tpimpi.diagnostics.cache_table import print_cache
from tpimpi.errors import InputError, shorten, shorten_path
from tpimpi.system.files import check_writable, write_json
from tpimpi.system.terminal import is_terminal
from tpimpi.system.units import show_size
from tpimpi.weights.cache import CachedSlices, list_cache, remove_slices
from tpimpi.weights.locations import cache_folder

_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class CacheOptions:
    """What `cache` takes: names of sets of slices to remove, or the seconds that they were not used."""

    remove: list[str]
    older_than: int | None
    yes: bool
    json: str | None


def cache_parser() -> argparse.ArgumentParser:
    """Options of `cache`."""
    parser = Parser(
        prog="python -m tpimpi cache",
        description="List the slices in this host's cache folder, where a run puts those that it makes: $TPIMPI_CACHE, or "
        "tpimpi in the user's cache folder. With --remove or --older-than, remove some; a run makes them again when it "
        "needs them.",
        allow_abbrev=False,
    )
    parser.add_argument("--remove", nargs="+", metavar="NAME", default=[], help="remove these (the names in the table)")
    parser.add_argument(
        "--older-than", type=age, metavar="TIME", help="remove what no run has used for so long, such as 30d, 12h or 2w"
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument(
        "--json", metavar="FILE", help="write the table as JSON: sizes in bytes, times in seconds since 1970"
    )
    return parser


def age(text: str) -> int:
    """The meaning of `--older-than`, in seconds."""
    match = re.fullmatch(r"([0-9]{1,6})([hdw])", text)
    if match is None:
        raise InputError(f"--older-than is {shorten(text)!r}, must be a number of hours, days or weeks: 12h, 30d or 2w")
    return int(match[1]) * _UNITS_S[match[2]]


def cache_alone(job: Job) -> int:
    """The whole command."""
    options: CacheOptions = parsed_into(CacheOptions, cache_parser().parse_args(job.arguments[1:]))
    if options.json is not None:
        check_writable(options.json, "--json")
    folder = cache_folder()
    found = list_cache(folder)
    chosen = _chosen(options, folder, found)
    if options.json is not None:
        values = {"folder": str(folder), "slices": [asdict(slices) for slices in found]}
        write_json(Path(options.json), values, "--json")
    if not options.remove and options.older_than is None:
        print_cache(folder, found)
        return 0
    if not chosen:
        say("nothing to remove")
        return 0
    if not options.yes and not _agreed(folder, chosen):
        say("nothing was removed")
        return 0
    for path in remove_slices(folder, [slices.name for slices in chosen]):
        say(f"{path} stays, as there is something besides slices in it")
    say(f"removed {_sets(chosen)}")
    return 0


def _chosen(options: CacheOptions, folder: Path, found: Sequence[CachedSlices]) -> list[CachedSlices]:
    """What is to be removed. Raises InputError for a name that there is not."""
    by_name = {slices.name: slices for slices in found}
    for name in options.remove:
        if name not in by_name:
            raise InputError(
                f"there are no slices named {shorten_path(name)!r} in {folder}; see: python -m tpimpi cache"
            )
    if options.older_than is None:
        return [by_name[name] for name in dict.fromkeys(options.remove)]
    oldest = time.time() - options.older_than
    some = [by_name[name] for name in dict.fromkeys(options.remove)] if options.remove else found
    return [slices for slices in some if slices.last_used < oldest]


def _sets(chosen: Sequence[CachedSlices]) -> str:
    size = show_size(sum(slices.nbytes for slices in chosen))
    return f"{len(chosen)} set{'' if len(chosen) == 1 else 's'} of slices, {size}"


def _agreed(folder: Path, chosen: Sequence[CachedSlices]) -> bool:
    """Ask on the terminal. Raises InputError where there is none."""
    if not (is_terminal(0) and is_terminal(2)):
        raise InputError(f"there is no terminal to ask on before removing {_sets(chosen)}; give --yes")
    for slices in chosen:
        say(f"{folder / slices.name}  {show_size(slices.nbytes)}")
    print(f"remove {_sets(chosen)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
