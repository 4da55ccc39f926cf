"""`doctor`: what every rank of a run has, what the links between them give, what is wrong, and what to type to mend it.

Under mpirun all ranks take part (`rank_facts` is their side). With `--hostfile`, without mpirun, see `hosts`.

A finding is wrong where it keeps a run from starting, or from working well, and can be mended; else it is a note. The exit
code is 1 where something is wrong, 0 where nothing is, and 2 for bad options.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tpimpi.diagnostics.doctor import rank_facts
from tpimpi.diagnostics.doctor.findings import Checkup, findings
from tpimpi.diagnostics.doctor.rank_facts import ExpectedSlices, Facts
from tpimpi.diagnostics.doctor.report import as_json, print_report
from tpimpi.diagnostics.options import DoctorOptions
from tpimpi.engine.engine import identity
from tpimpi.engine.ranks import gather_hellos
from tpimpi.errors import InputError, ModelError, SliceError
from tpimpi.star import Star
from tpimpi.star.control import StopNote, send_note
from tpimpi.system import placement
from tpimpi.system.files import write_json
from tpimpi.weights.locations import cache_name, model_path
from tpimpi.weights.make import choose_formats, make_header
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.writer import stored_bytes
from tpimpi.weights.sources import open_source

# All ranks together


def doctor(options: DoctorOptions, star: Star, arguments: Sequence[str]) -> int:
    """Rank 0 of `doctor`, which ends the run on every rank; the exit code. `arguments` are those of the command, which
    ranks compare. Raises InputError, and StarError where a rank does not answer."""
    for option, given in (("--hostfile", options.hostfile is not None), ("--make-keys", options.make_keys)):
        if given and star.rank.size > 1:
            raise InputError(f"{option} is for doctor without mpirun; leave mpirun out, or {option}")
    if options.hostfile is not None:
        from tpimpi.diagnostics.doctor import hosts

        return hosts.doctor(options.hostfile, options)
    if options.make_keys:
        from tpimpi.diagnostics.doctor.keys import make_own_keys

        make_own_keys(rotate=options.rotate_keys)
        return 0
    star.timeout = rank_facts.TIMEOUT_S
    hellos = gather_hellos(star, arguments)
    checkup = _check_up(star, hellos, _expected_slices(options, star.rank.size))
    send_note(star, StopNote(0))
    found = list(findings(checkup))
    print_report(checkup, found)
    if options.json is not None:
        write_json(options.json, as_json(checkup, found), "--json")
    return int(any(finding.wrong for finding in found))


def _check_up(star: Star, hellos: Sequence[dict[str, Any]], wanted: ExpectedSlices) -> Checkup:
    """Have all ranks looked at, as far as they know how: ranks with another version may not."""
    if any(rank_facts.TASK not in hello.get("tasks", ()) for hello in hellos[1:]):
        return Checkup([_of_hello(hello) for hello in hellos], [], [])
    facts = rank_facts.gather_facts(star, wanted)
    given = placement.given_hosts()
    if star.rank.size == 1 or len({each.tpimpi for each in facts}) > 1:
        return Checkup(facts, [], [], given)
    return Checkup(facts, *rank_facts.gather_link_facts(star), given)


def _of_hello(hello: dict[str, Any]) -> Facts:
    """What is known of a rank that has only said who it is."""
    return Facts(
        host=hello["host"],
        tpimpi=hello["version"],
        kernels="?" if hello.get("native") else "",
        cores=hello.get("cores", []),
        host_cores=hello.get("host_cores", 0),
    )


def _expected_slices(options: DoctorOptions, ranks: int) -> ExpectedSlices:
    """The slices that a run with these options would use; none where there is no model to be found, and none was named."""
    if options.slices is not None:
        return ExpectedSlices(folder=options.slices, identity=_identity_of(Path(options.slices), ranks))
    if options.shares is None:
        return ExpectedSlices()
    try:
        path = model_path(options.model)
    except ModelError:
        return ExpectedSlices()
    with open_source(path) as source:
        formats = choose_formats(source, options.format)
        partition = make_partition(source.config, options.shares)
        headers = [make_header(source, partition, rank, formats) for rank in range(ranks)]
        return ExpectedSlices(
            cache_name=cache_name(source, partition, formats),
            identity=identity(headers[0]),
            sizes=[stored_bytes(header) for header in headers],
        )


def _identity_of(folder: Path, ranks: int) -> dict[str, str]:
    """What rank 0's slice in that folder has in common with the others; nothing where it cannot be opened."""
    try:
        with closing(SliceFile(folder / slice_name(0, ranks))) as file:
            return identity(file.header)
    except SliceError:
        return {}
