"""Tables and pictures of the results of experiments, for docs/measurements.md or a page of their own.

A page has places for them, `<!-- table devices -->` to `<!-- end -->`, between which all is written anew;
a page that is not there yet is made of the tables alone. Pictures stand beside the page, as PNG.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiment_claims import claims
from experiment_results import Results
from experiment_rows import read_rows
from experiment_tables import Found, Table, again, by_network, mb, ms, per_token, seconds, times
from home_devices import parse_bandwidth, parse_duration

from tpimpi.errors import InputError
from tpimpi.plotting import Line, plot_lines

LIMIT = "the disk alone, q4_0"
_PLACE = re.compile(r"<!-- table (\w+) -->.*?<!-- end -->", re.S)
_MARK = re.compile(r"<!-- (?:table (\w+)|end) -->")


def newest(results: Results) -> list[Found]:
    """Of each row the newest result, in the order in which rows were first measured."""
    by_row: dict[str, Found] = {}
    for line in results.lines:
        by_row[repr(sorted(line["settings"].items()))] = Found(line)
    return list(by_row.values())


def write_page(page: Path, results: Results) -> None:
    """Fill in, or make, the page. Raises InputError where that cannot be."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a page has pictures, which need matplotlib; do: pip install 'matplotlib>=3.8'")
    found = newest(results)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        text = page.read_bytes().decode() if page.exists() else _EMPTY
        end = "\r\n" if "\r\n" in text else "\n"
        marks = [(match[1] or "end", text.count("\n", 0, match.start()) + 1) for match in _MARK.finditer(text)]
        for (name, line), (after, _) in zip(marks, [*marks[1:], ("", 0)], strict=True):
            if name != "end" and after != "end":
                raise InputError(f"{page}, line {line}: table {name} has no <!-- end -->; add it")
            if name != "end" and name not in _TABLES:
                raise InputError(f"{page}, line {line}: there is no table {name}; there are {', '.join(_TABLES)}")
        made = {name: _TABLES[name](found, page.parent) for name, _ in marks if name != "end"}
        text = _PLACE.sub(lambda match: f"<!-- table {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->", text)
        new = page.with_name(f".{page.name}.new")
        try:
            new.write_bytes(re.sub(r"\r?\n", end, text).encode())
            new.replace(page)
        finally:
            new.unlink(missing_ok=True)
    except UnicodeDecodeError as error:
        raise InputError(f"--page {page} is no text in UTF-8; give another one") from error
    except OSError as error:
        raise InputError(f"--page {page}: {error.strerror}; give another place") from error
    except KeyError as error:
        raise InputError(
            f"{results.path} has results without {error}; remove those lines, or measure them again"
        ) from error


def _of(found: Iterable[Found], experiment: str, measure: str = "generate") -> list[Found]:
    return [each for each in found if (each["experiment"], each["measure"]) == (experiment, measure)]


# The tables, each of all results, into Markdown


def conditions(found: Sequence[Found], folder: Path) -> str:
    """The machine, versions and commits."""
    lines = []
    for machine in dict.fromkeys(tuple(each.line["machine"].items()) for each in found):
        these = [each.line for each in found if tuple(each.line["machine"].items()) == machine]
        values = dict(machine)
        days = sorted({line["when"][:10] for line in these})
        commits = list(dict.fromkeys(line["commit"] for line in these))
        at = f"at commit {commits[0]}" if len(commits) == 1 else f"at commits {', '.join(commits)}, as each line says"
        names = dict.fromkeys(name for line in these for name in line["versions"] if name != "tpimpi")
        versions = ", ".join(_version(name, [line["versions"].get(name) for line in these]) for name in names)
        lines.append(
            f"{values['cpu']}, {values['cores']} cores, {values['memory_gib']} GiB, {values['system']}; {versions}; "
            f"{len(these)} rows, measured {days[0]}{'' if len(days) == 1 else f' to {days[-1]}'} {at}."
        )
    rows = [row.settings() for row in read_rows()]
    done = sum(row in [each.line["settings"] for each in found] for row in rows)
    lines.append(f"Of the {len(rows)} rows of the full set {done} are measured.")
    return "\n\n".join(lines)


def _version(name: str, of: Sequence[str | None]) -> str:
    """All versions of something that took part, and in how many rows, where not all say so."""
    known = [version for version in of if version is not None]
    return f"{name} {' and '.join(dict.fromkeys(known))}" + (f" ({len(known)} rows)" if len(known) < len(of) else "")


def emulation(found: Sequence[Found], folder: Path) -> str:
    table = Table("One way, wished", "seen", "cores, wished", "seen", "disk, wished", "seen")
    for each in _of(found, "emulation", "emulation"):
        f = each.figures
        cells = (
            f["cores_wished"],
            f"{f['cores']:.3f}",
            f"{f['read_wished_bps'] / 1e6:.0f} MB/s",
            mb(f["read_bps"]) + "/s",
        )
        table.add(ms(f["latency_wished_s"]), ms(f["latency_s"]), *map(str, cells))
    other = Table("Four ranks", "s/token", "of shared memory's")
    for each in _of(found, "emulation", "ways"):
        times_ = each.figures["s_per_token"]
        for name, value in times_.items():
            other.add(name, per_token(value), times(value / times_["shared memory"]))
    return f"{table}\n\n{other}"


def _devices(found: Sequence[Found], experiment: str) -> str:
    table = Table(
        *(
            "Shape, format",
            "memory of each",
            "devices",
            "load",
            "TTFT cold",
            "TTFT",
            "s/token",
            "TTFT, times",
            "s/token, times",
            "`plan` said",
        ),
        *("peak", "pinned", "streamed a token", "compute / disk / star", "`… run`"),
    )
    rows = _of(found, experiment)
    for each in sorted(rows, key=lambda each: (each.model, each.limit or 0, each["devices"])):
        same = [other for other in rows if (other.model, other.limit) == (each.model, each.limit)]
        one = next((other for other in same if other["devices"] == 1), None)
        f = each.figures
        parts = " / ".join(f"{100 * f['parts'][name]:.0f}" for name in ("compute", "read_wait", "star")) + " %"
        gain = [times(one.figures[name] / f[name]) if one else "-" for name in ("ttft_s", "s_per_token")]
        table.add(
            *(
                each.model,
                each["memory"] or "all",
                str(each["devices"]),
                seconds(f["load_s"]),
                seconds(f["ttft_cold_s"]),
            ),
            *(
                seconds(f["ttft_s"]),
                per_token(f["s_per_token"]),
                *gain,
                per_token(f.get("predicted", {}).get("s_per_token")),
                mb(each.peak),
                mb(max(f["pinned_bytes"])),
                mb(max(f["streamed_bytes_per_token"])),
                parts,
            ),
            again(each),
        )
    return str(table)


def devices(found: Sequence[Found], folder: Path) -> str:
    rows = _of(found, "devices")
    panels = []
    for shape in dict.fromkeys(each["shape"] for each in rows):
        same = [each for each in rows if each["shape"] == shape and each["memory"] == "1GiB"]
        lines = []
        for fmt in dict.fromkeys(each["format"] for each in same):
            points = sorted((each["devices"], each.figures["s_per_token"]) for each in same if each["format"] == fmt)
            lines.append(Line(fmt, *zip(*points, strict=True)))
        if lines:
            panels.append((f"{shape}, 1 GiB a device", lines))
    return _devices(found, "devices") + _picture(
        panels, folder, "devices", ("devices", "seconds a token"), ticks=(1, 2, 3, 4)
    )


def eighths(found: Sequence[Found], folder: Path) -> str:
    return _devices(found, "eighths")


def peers(found: Sequence[Found], folder: Path) -> str:
    table = Table(
        "Program",
        "format",
        "devices",
        "cores, memory, disk of each",
        "load",
        "TTFT cold",
        "TTFT",
        "s/token",
        "peak",
        "`… run`",
    )
    rows = [each for each in found if each["experiment"] == "peers"]
    for each in sorted(rows, key=lambda each: (each["shape"], each["memory"] == "", each["format"], each["program"])):
        f = each.figures
        limits = ", ".join([f"{each['cores']:g}", each["memory"] or "all", each["read"] or "as it is"])
        if "killed" in f:
            cells = [f"killed: {f['killed']}", "", "", ""]
        else:
            cells = [seconds(f["load_s"])]
            cells += [seconds(f.get("ttft_cold_s", f.get("ttft_s"))), seconds(f.get("ttft_warm_s", f.get("ttft_s")))]
            cells.append(per_token(f["s_per_token"]))
        table.add(each["program"], each["format"], str(each["devices"]), limits, *cells, mb(each.peak), again(each))
    return str(table)


def memory(found: Sequence[Found], folder: Path) -> str:
    table = Table(
        "Program",
        "format",
        "memory",
        "peak",
        "pinned",
        "streamed a token",
        "s/token",
        "disk's line",
        "/ line",
        "`… run`",
    )
    rows = [each for each in found if each["experiment"] == "memory"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in rows:
        f = each.figures
        asked = (each["window"] and f"window {each['window']}") or each["memory"] or each["budget"]
        cells = [each["program"], each["format"], asked, mb(each.peak)]
        if "killed" in f:
            table.add(*cells, "", "", f"killed: {f['killed']}", "", "", again(each))
            continue
        where, token = (each.peak or 0) / 1e6, f["s_per_token"]
        name = f"{each['program']} {each['format']}{', window' if each['window'] else ''}"
        lines.setdefault(name, []).append((where, token))
        if each["program"] == "tpimpi" and each["read"]:
            streamed = sum(f["streamed_bytes_per_token"])
            line = streamed / parse_bandwidth(each["read"], "read")
            cells += [mb(sum(f["pinned_bytes"])), mb(streamed), per_token(token), per_token(line)]
            table.add(*cells, times(token / line) if line > 0.01 else "-", again(each))
            if line > 0.01 and each["format"] == "q4_0" and not each["window"]:
                lines.setdefault(LIMIT, []).append((where, line))
        else:
            table.add(*cells, "", "", per_token(token), "", "", again(each))
    drawn = [Line(name, *zip(*sorted(points), strict=True), limit=name == LIMIT) for name, points in lines.items()]
    panels = [("seconds a token against peak memory", drawn)] if drawn else []
    return str(table) + _picture(panels, folder, "memory", ("peak memory, MB", "seconds a token"))


def network(found: Sequence[Found], folder: Path) -> str:
    sums, runs = _of(found, "network", "allreduce"), _of(found, "network")
    picture = _picture(_sum_panels(sums), folder, "network", ("latency one way, ms", "milliseconds"))
    return f"{_sums(sums)}{picture}\n\nWhole runs, prompts of 128 tokens:\n\n{_network_runs(runs)}"


def _sums(rows: Sequence[Found]) -> Table:
    names = ("star", "exchange", "mesh", "ring", "tree", "library")
    table = Table("Numbers", "devices", "one way", "bandwidth", "two hops", *names, "`auto`", "`… run`")
    for size in dict.fromkeys(row["numbers"] for each in rows for row in each.figures["rows"]):
        for each in rows:
            row = next(row for row in each.figures["rows"] if row["numbers"] == size)
            took = row["seconds"]
            table.add(
                *(str(size), str(each["devices"]), each["latency"], each["bandwidth"], ms(row["two_hops"])),
                *(f"**{ms(took[name])}**" if took[name] == min(took.values()) else ms(took[name]) for name in names),
                *(row["auto"], again(each)),
            )
    return table


def _sum_panels(rows: Sequence[Found]) -> list[tuple[str, list[Line]]]:
    panels = []
    for size in (4096, 524288):
        for bandwidth in ("50Mbit/s", "1Gbit/s"):
            points: dict[str, list[tuple[float, float]]] = {}
            for each in rows:
                if (each["devices"], each["bandwidth"]) == (4, bandwidth):
                    latency = parse_duration(each["latency"], "latency") * 1e3
                    took = next(row["seconds"] for row in each.figures["rows"] if row["numbers"] == size)
                    for name, value in took.items():
                        points.setdefault(name, []).append((latency, value * 1e3))
            lines = [Line(name, *zip(*sorted(at), strict=True)) for name, at in points.items()]
            if lines:
                panels.append((f"{size} numbers, 4 devices, {bandwidth}", lines))
    return panels


def _network_runs(rows: Sequence[Found]) -> Table:
    names = list(dict.fromkeys(each["allreduce"] for each in rows))
    table = Table("One way", "bandwidth", "", *names, "`… run`")
    for network, at in by_network(rows).items():
        command = again(next(iter(at.values())), each="allreduce")
        for what, figure, show in (("s/token", "s_per_token", per_token), ("TTFT", "ttft_s", seconds)):
            shown = (show(at[name].figures[figure]) if name in at else "" for name in names)
            table.add(*network, what, *shown, command)
    return table


def big(found: Sequence[Found], folder: Path) -> str:
    return _devices(found, "70b")


def predictions(found: Sequence[Found], folder: Path) -> str:
    table = Table(
        "Machines",
        "assumed of each",
        "ranks",
        "s/token",
        "TTFT, 16 tokens",
        "limited by",
        "memory of each",
        "streamed a token",
    )
    for each in _of(found, "70b", "predict"):
        for ranks, one in each.figures["ranks"].items():
            table.add(
                *(
                    each["program"],
                    each.figures["assumed"]["why"],
                    ranks,
                    per_token(one["s_per_token"]),
                    seconds(one["ttft_s"]),
                ),
                *(one["limit"], mb(max(one["memory_bytes"], default=0)), mb(sum(one["streamed_bytes_per_token"]))),
            )
    return str(table)


def formats(found: Sequence[Found], folder: Path) -> str:
    table = Table("Format", "tokens", "perplexity", "of f32", "mean KL divergence from f32, nats", "`… run`")
    rows = _of(found, "formats", "perplexity")
    for each in rows:
        f = each.figures
        table.add(
            *(each["format"], str(f["tokens_scored"]), f"{f['perplexity']:.3f} ± {f['perplexity_se']:.2f}"),
            *(f"{f['against']['perplexity']:.3f}", f"{f['against']['kl_mean']:.2g}", again(each)),
        )
    return str(table)


def what_was_claimed(found: Sequence[Found], folder: Path) -> str:
    table = Table("Claim", "Verdict", "Measured here")
    for claim in claims(found):
        table.add(*claim)
    return str(table)


_TABLES: dict[str, Callable[[Sequence[Found], Path], str]] = {
    "conditions": conditions,
    "claims": what_was_claimed,
    "emulation": emulation,
    "devices": devices,
    "eighths": eighths,
    "peers": peers,
    "memory": memory,
    "network": network,
    "big": big,
    "predictions": predictions,
    "formats": formats,
}


_EMPTY = "# Measurements\n\n" + "\n\n".join(f"<!-- table {name} -->\n<!-- end -->" for name in _TABLES) + "\n"


def _picture(panels: Any, folder: Path, name: str, axes: tuple[str, str], ticks: Sequence[float] = ()) -> str:
    if not panels:
        return ""
    path = folder / f"measured-{name}.png"
    plot_lines(panels, path, axes, "--page", ticks=ticks)
    return f"\n\n![{axes[1]} against {axes[0]}]({path.name})"
