"""The experiments: what the paper claims, and what users would pick instead, measured row by row; as root, on Linux.

    python -m bench.experiments run [NAME…] [--quick | --smallest] [--only "KEY=VALUE …"] [--again | --missing]
    python -m bench.experiments list [NAME…] [--quick | --smallest]      rows, and whether they are done
    python -m bench.experiments page [--page FILE.md]                    tables and pictures of what is in --results

Rows are described in bench/experiments/experiments.toml, a result is a line of JSON in --results. A row that was measured
on this machine, at the commit that last changed the program, is not run again unless `--again` is given; with `--missing`,
none that was measured on this machine at any commit (each result names its own). Each row runs in an emulated home
(bench/home) with its limits; slices and models with random weights are made in --work, and removed when no row that is
left needs them. `--only` gives settings as they stand in the file, several values with commas between:
--only "shape=llama-2-7b devices=1,4". Run it while nothing else runs.

With --launch rows run on real machines instead, with no limits but their own: only those whose number of devices is at
most --ranks, and that limits do not tell from each other. All machines must see --work.

    python -m bench.experiments run devices --launch "mpirun -np {ranks} --map-by node --hostfile home.txt" --ranks 4
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from bench.experiments.pages import write_page
from bench.experiments.results import Results, commit
from bench.experiments.rows import SLICES_BYTES_PER_S, VARIED, Row, choose, on_machines, read_rows, repeat
from bench.experiments.runs import measure
from bench.experiments.site import Site
from tpimpi.errors import InputError, TpimpiError

EXIT_INPUT, EXIT_INTERRUPTED = 2, 130
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
WITHOUT_DEVICES = ("perplexity", "predict")  # measures


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """By an exception, so that homes are removed; nothing breaks that off."""
    for other in (*END_SIGNALS, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def left_behind(work: Path) -> str:
    """What an interrupted run leaves there, as the end of a sentence."""
    models = Site(work).models
    size = models.nbytes()
    return f"; {models.folder} has {size / 1e9:.1f} GB of slices and models, which go when it ends" if size else ""


def describe(row: Row) -> str:
    """The row in a few words."""
    return " ".join(f"{key}={value}" for key in VARIED if (value := getattr(row, key)) != "")


def duration(seconds: float) -> str:
    """Such as 42 s, 7 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def expected(row: Row, results: Results) -> float:
    """About the seconds that a row takes: what it took, if it was ever measured."""
    before = results.find(row, here=False, now=False)
    return before["took_s"] if before else row.expected_s + (row.model_bytes / SLICES_BYTES_PER_S if row.slices else 0)


def run(options: argparse.Namespace, rows: list[Row], results: Results) -> int:
    """Measure the rows that have no result yet; 1 where some failed."""
    site = Site(options.work, options.launch)
    models = site.models
    if not options.again:
        done = [row for row in rows if results.find(row, now=not options.missing)]
        rows = [row for row in rows if row not in done]
        if done:
            when = "" if options.missing else f" at {commit()}"
            print(f"{len(done)} rows are done{when}; --again repeats them", file=sys.stderr)
    order = list(dict.fromkeys(row.slices for row in rows))
    rows = sorted(rows, key=lambda row: order.index(row.slices))  # those of the same slices together
    failed = 0
    for number, row in enumerate(rows):
        left = rows[number:]
        seconds = sum(expected(each, results) for each in left)
        print(
            f"{number + 1} of {len(rows)}, about {duration(seconds)} left: {row.experiment}: {describe(row)}",
            file=sys.stderr,
            flush=True,
        )
        if not options.keep:
            models.keep({each.slices for each in left})
        measured = attempt(row, site)
        if measured is None:
            failed += 1
            continue
        figures, took = measured
        results.add(row, figures, took, f"python -m bench.experiments run {repeat(row.settings(), launch=site.launch)}")
        print(f"  {brief(figures)} ({took:.0f} s)", file=sys.stderr, flush=True)
    if not options.keep:
        models.keep(())
    if failed:
        print(f"{failed} of {len(rows)} rows failed; they are tried again by the same command", file=sys.stderr)
    return int(failed > 0)


def attempt(row: Row, site: Site) -> tuple[dict[str, object], float] | None:
    """What `measure` returns, or None where it fails, with whatever it is: other rows may do, and hours were spent on them.

    A row that fails is tried once more: a launcher that now and then does not get its ranks together must not leave a hole
    in a measurement of hours.
    """
    for then in ("; once more", ""):
        try:
            return measure(row, site)
        except (TpimpiError, subprocess.SubprocessError, OSError) as error:
            print(f"  failed: {error}{then}", file=sys.stderr, flush=True)
    return None


def brief(figures: dict[str, object]) -> str:
    """The figures that one wants to see at once."""
    names = (
        "killed",
        "s_per_token",
        "ttft_s",
        "ttft_cold_s",
        "perplexity",
        "latency_s",
        "read_bps",
        "cores",
        "bandwidth",
    )
    found = {name: figures[name] for name in names if figures.get(name) is not None}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )


def list_rows(rows: Sequence[Row], results: Results, *, now: bool) -> None:
    """A line for each, on stdout; `now`: results of another commit do not count."""
    for row in rows:
        state = "done" if results.find(row, now=now) else f"about {duration(expected(row, results))}"
        print(f"{row.experiment}: {describe(row)}: {state}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "list", "page"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="of experiments (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="every table in small")
    size.add_argument("--smallest", dest="size", action="store_const", const="smallest", help="a few layers, minutes")
    parser.add_argument("--only", default="", metavar='"KEY=VALUE …"', help="rows with these settings")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true", help="also rows that are done")
    which.add_argument("--missing", action="store_true", help="no row that was done, at whatever commit")
    parser.add_argument("--keep", action="store_true", help="keep slices and models in --work")
    parser.add_argument("--results", type=Path, default=Path("measurements.jsonl"), help="default %(default)s")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/tpimpi-experiments"), help="default %(default)s")
    parser.add_argument("--page", type=Path, default=Path("measurements.md"), help="default %(default)s")
    parser.add_argument(
        "--launch", default="", metavar="WORDS", help="the launcher of real machines, with {ranks} in it"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="with --launch: how many it can start (default: 1)")
    options = parser.parse_intermixed_args(arguments)  # names may stand after options
    options.size = options.size or "full"
    return options


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options that make no sense; fill in what is not given."""
    if options.launch:
        try:
            words = shlex.split(options.launch)
        except ValueError as error:
            raise InputError(f"--launch is {options.launch!r}: {error}") from error
        if not any("{ranks}" in word for word in words):
            raise InputError(f"--launch is {options.launch!r}, must have {{ranks}} where their number stands")
        if shutil.which(words[0]) is None:
            raise InputError(f"--launch is {options.launch!r}, but there is no program {words[0]} on PATH")
    elif options.ranks is not None:
        raise InputError(f"--ranks is {options.ranks}, but there is no --launch for them; give both, or neither")
    if options.ranks is None:
        options.ranks = 1
    if options.ranks < 1:
        raise InputError(f"--ranks is {options.ranks}, must be 1 or more")
    if options.what == "page" and options.names:
        raise InputError(f"page takes no names ({options.names[0]}); it shows all that is in --results")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        os.environ |= {
            f"{name}_ALLOW_RUN_AS_ROOT{suffix}": "1" for name in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")
        }
    for number in END_SIGNALS:
        signal.signal(number, exit_on_signal)
    # Python sets this one itself, but not where a script's shell started it in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check(options)
        results = Results(options.results)
        if options.what == "page":
            if not options.results.exists():
                raise InputError(f"--results {options.results}: there is no such file; give that of a run")
            write_page(options.page, results)
            return 0
        rows = choose(read_rows(options.size), options.names, options.only)
        if options.launch:
            rows = on_machines(rows, options.ranks)
            if not rows:
                raise InputError(
                    f"none of these rows runs on {options.ranks} machines; give other names, or more --ranks"
                )
        if options.what == "list":
            list_rows(rows, results, now=not options.missing)
            return 0
        if not options.launch and os.geteuid() != 0 and any(row.measure not in WITHOUT_DEVICES for row in rows):
            raise InputError('emulated homes need root: sudo env PATH="$PATH" …, or --launch for real machines')
        try:
            options.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--work {options.work}: {error.strerror}; give another folder") from error
        try:
            with FileLock(options.work / "lock", timeout=0):
                results.check_writable()
                return run(options, rows, results)
        except Timeout:
            raise InputError(
                f"another run is at work in {options.work}, and would be measured too; wait for it"
            ) from None
    except InputError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:  # of the places that were given
        print(f"experiments: {error.filename}: {error.strerror}; give another place", file=sys.stderr)
        return EXIT_INPUT
    except TpimpiError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        print(
            f"experiments: interrupted; what is done is kept, and the same command goes on{left_behind(options.work)}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(error.code or 0)
