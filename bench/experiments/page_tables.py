"""The tables of the page of measurements, each a function of all results that returns Markdown, with pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.experiments.claims import claims
from bench.experiments.prediction_tables import mixture_predictions, predictions
from bench.experiments.rows import read_rows
from bench.experiments.tables import (
    Found,
    Table,
    by_network,
    command_cell,
    mb,
    mbits,
    ms,
    of_measure,
    per_token,
    seconds,
    times,
)
from bench.home.devices import parse_bandwidth, parse_duration
from tpimpi.diagnostics.plots import Line, plot_lines

DISK_LINE = "the disk alone, q4_0"


def conditions(found: Sequence[Found], folder: Path, others: Sequence[Found] = ()) -> str:
    """The machine, versions and commits; and the machines of `others`, whose results are not shown."""
    lines = [each.line for each in found]
    said = []
    if lines:
        days = sorted({line["when"][:10] for line in lines})
        commits = list(dict.fromkeys(line["commit"] for line in lines))
        at = f"at commit {commits[0]}" if len(commits) == 1 else f"at commits {', '.join(commits)}, as each line says"
        said.append(
            f"{_machine(found[0])}; {_versions([line['versions'] for line in lines])}; "
            f"{len(lines)} rows, measured {days[0]}{'' if len(days) == 1 else f' to {days[-1]}'} {at}."
        )
        if peers := [each.figures["versions"] for each in found if "versions" in each.figures]:
            said.append(f"The other programs: {_versions(peers, leave_out=('python',), rows=False)}.")
    rows = [row.settings() for row in read_rows()]
    settings = [line["settings"] for line in lines]
    said.append(f"Of the {len(rows)} rows of the full set {sum(row in settings for row in rows)} are measured.")
    if others:
        of = [f"{len(list(each))} of {machine}" for machine, each in groupby(others, key=_machine)]
        said.append(f"Not shown are results of other machines: {'; '.join(of)}.")
    return "\n\n".join(said)


def _machine(found: Found) -> str:
    values = found.line["machine"]
    return f"{values['cpu']}, {values['cores']} cores, {values['memory_gib']} GiB, {values['system']}"


def _versions(of: Sequence[Mapping[str, str]], leave_out: Collection[str] = ("tpimpi",), rows: bool = True) -> str:
    """All versions of what took part; and with `rows` in how many rows, where not all say so."""
    said = []
    for name in dict.fromkeys(name for each in of for name in each if name not in leave_out):
        known = [each[name] for each in of if name in each]
        some = f" ({len(known)} rows)" if rows and len(known) < len(of) else ""
        said.append(f"{name} {' and '.join(dict.fromkeys(known))}{some}")
    return ", ".join(said)


def emulation(found: Sequence[Found], folder: Path) -> str:
    pairs = ("cores, wished", "seen", "disk, wished", "seen", "link, wished", "seen")
    table = Table("One way, wished", "seen", *pairs, "`… run`")
    for each in of_measure(found, "emulation", "emulation"):
        f = each.figures
        table.add(
            *(ms(f["latency_wished_s"]), ms(f["latency_s"]), str(f["cores_wished"]), f"{f['cores']:.3f}"),
            *(f"{mb(f['read_wished_bps'])}/s", f"{mb(f['read_bps'])}/s"),
            *(mbits(f.get("bandwidth_wished")), mbits(f.get("bandwidth")), command_cell(each)),
        )
    other = Table("Four ranks", "s/token", "of shared memory's", "`… run`")
    for each in of_measure(found, "emulation", "ways"):
        times_ = each.figures["s_per_token"]
        for name, value in times_.items():
            other.add(name, per_token(value), times(value / times_["shared memory"]), command_cell(each))
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
            "`plan` said (s/token, TTFT)",
        ),
        *("peak", "pinned", "streamed a token", "compute / disk / star", "`… run`"),
    )
    rows = of_measure(found, experiment)
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
                _predicted(f),
                mb(each.peak),
                mb(max(f["pinned_bytes"])),
                mb(max(f["streamed_bytes_per_token"])),
                parts,
            ),
            command_cell(each),
        )
    return str(table)


def _predicted(figures: Mapping[str, Any]) -> str:
    found = figures.get("predicted")
    return f"{per_token(found['s_per_token'])}, {seconds(found['ttft_s'])}" if found else "-"


def devices(found: Sequence[Found], folder: Path) -> str:
    rows = of_measure(found, "devices")
    panels = []
    for shape in dict.fromkeys(each["shape"] for each in rows):
        numbers: dict[str, set[int]] = {}  # of devices, by their memory
        for each in rows:
            if each["shape"] == shape:
                numbers.setdefault(each["memory"], set()).add(each["devices"])
        of = max(numbers, key=lambda memory: len(numbers[memory]))
        if len(numbers[of]) < 2:
            continue
        same = [each for each in rows if (each["shape"], each["memory"]) == (shape, of)]
        lines = []
        for fmt in dict.fromkeys(each["format"] for each in same):
            points = [(each["devices"], each.figures["s_per_token"]) for each in same if each["format"] == fmt]
            lines.append(_line(fmt, points))
        panels.append((f"{shape}, {re.sub('(?<=[0-9])(?=[A-Za-z])', ' ', of) or 'all memory of'} a device", lines))
    ticks = sorted({x for _, lines in panels for line in lines for x in line.x})
    return _devices(found, "devices") + _picture(panels, folder, "devices", ("devices", "seconds a token"), ticks=ticks)


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
        cores = "all" if each["cores"] is None else f"{each['cores']:g}"
        limits = ", ".join([cores, each["memory"] or "all", each["read"] or "as it is"])
        if "killed" in f:
            cells = [f"killed: {f['killed']}", "", "", ""]
        else:
            cells = [seconds(f["load_s"])]
            cells += [seconds(each.first_cold_s), seconds(f.get("ttft_warm_s", f["ttft_s"]))]
            cells.append(per_token(f["s_per_token"]))
        table.add(
            each["program"], each["format"], str(each["devices"]), limits, *cells, mb(each.peak), command_cell(each)
        )
    return str(table)


def rpc(found: Sequence[Found], folder: Path) -> str:
    """Beside llama.cpp's RPC servers: how many times as fast ours is on the same home."""
    rows = [each for each in found if each["experiment"] == "rpc"]
    table = Table("Program", "model", "one way", "TTFT", "s/token", "times llama.cpp's", "`… run`")
    keys = ("shape", "layers", "format", "devices", "latency")
    theirs = {tuple(each[key] for key in keys): each.figures for each in rows if each["measure"] == "peer"}
    for each in sorted(rows, key=lambda each: (each.model, each["latency"])):
        if "killed" in each.figures:
            cells = [f"killed: {each.figures['killed']}", "", ""]
        else:
            token = each.figures["s_per_token"]
            other = theirs.get(tuple(each[key] for key in keys), {}).get("s_per_token")
            beside = times(other / token) if other and each["measure"] == "generate" else "-"
            cells = [seconds(each.figures["ttft_s"]), per_token(token), beside]
        table.add(each["program"], each.model, each["latency"], *cells, command_cell(each))
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
        cells = [each["program"], each["format"], each.asked, mb(each.peak)]
        if "killed" in f:
            table.add(*cells, "", "", f"killed: {f['killed']}", "", "", command_cell(each))
            continue
        where, token = (each.peak or 0) / 1e6, f["s_per_token"]
        name = f"{each['program']} {each['format']}{', window' if each['window'] else ''}"
        lines.setdefault(name, []).append((where, token))
        if each["program"] == "tpimpi" and each["read"]:
            streamed = sum(f["streamed_bytes_per_token"])
            line = streamed / parse_bandwidth(each["read"], "read")
            cells += [mb(sum(f["pinned_bytes"])), mb(streamed), per_token(token), per_token(line)]
            table.add(*cells, times(token / line) if line > 0.01 else "-", command_cell(each))
            if line > 0.01 and each["format"] == "q4_0" and not each["window"]:
                lines.setdefault(DISK_LINE, []).append((where, line))
        else:
            table.add(*cells, "", "", per_token(token), "", "", command_cell(each))
    drawn = [_line(name, points, limit=name == DISK_LINE) for name, points in lines.items()]
    panels = [("seconds a token against peak memory", drawn)] if drawn else []
    return str(table) + _picture(panels, folder, "memory", ("peak memory, MB", "seconds a token"))


def network(found: Sequence[Found], folder: Path) -> str:
    sums, runs = of_measure(found, "network", "allreduce"), of_measure(found, "network")
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
                *(row["auto"], command_cell(each)),
            )
    return table


def _sum_panels(rows: Sequence[Found]) -> list[tuple[str, list[Line]]]:
    """Of four devices, or of the most that there are; and of the least and the most bandwidth."""
    rows = [each for each in rows if each["latency"] and each["bandwidth"]]
    there = {each["devices"] for each in rows}
    count = 4 if 4 in there else max(there, default=0)
    rows = [each for each in rows if each["devices"] == count]
    bandwidths = sorted({each["bandwidth"] for each in rows}, key=lambda text: parse_bandwidth(text, "bandwidth"))
    panels = []
    for size in (4096, 524288):
        for bandwidth in dict.fromkeys((*bandwidths[:1], *bandwidths[-1:])):
            points: dict[str, list[tuple[float, float]]] = {}
            for each in rows:
                if each["bandwidth"] == bandwidth:
                    latency = parse_duration(each["latency"], "latency") * 1e3
                    took = next(row["seconds"] for row in each.figures["rows"] if row["numbers"] == size)
                    for name, value in took.items():
                        points.setdefault(name, []).append((latency, value * 1e3))
            lines = [_line(name, at) for name, at in points.items()]
            panels.append((f"{size} numbers, {count} devices, {bandwidth}", lines))
    return panels


def _network_runs(rows: Sequence[Found]) -> Table:
    names = list(dict.fromkeys(each["allreduce"] for each in rows))
    table = Table("One way", "bandwidth", "", *names, "`… run`")
    for network, at in by_network(rows).items():
        command = command_cell(next(iter(at.values())), each="allreduce")
        for what, figure, show in (("s/token", "s_per_token", per_token), ("TTFT", "ttft_s", seconds)):
            shown = (show(at[name].figures[figure]) if name in at else "" for name in names)
            table.add(*network, what, *shown, command)
    return table


def big(found: Sequence[Found], folder: Path) -> str:
    return _devices(found, "70b")


def mixture_devices(found: Sequence[Found], folder: Path) -> str:
    return _devices(found, "mixtures")


def formats(found: Sequence[Found], folder: Path) -> str:
    table = Table("Format", "tokens", "perplexity", "of f32", "mean KL divergence from f32, nats", "`… run`")
    rows = of_measure(found, "formats", "perplexity")
    for each in rows:
        f = each.figures
        table.add(
            *(each["format"], str(f["tokens_scored"]), f"{f['perplexity']:.3f} ± {f['perplexity_se']:.2f}"),
            *(f"{f['against']['perplexity']:.3f}", f"{f['against']['kl_mean']:.2g}", command_cell(each)),
        )
    return str(table)


def what_was_claimed(found: Sequence[Found], folder: Path) -> str:
    table = Table("Claim", "Verdict", "Measured here")
    for claim in claims(found):
        table.add(*claim)
    return str(table)


def _line(name: str, points: Iterable[tuple[float, float]], limit: bool = False) -> Line:
    """The line through these points, from left to right."""
    x, y = zip(*sorted(points), strict=True)
    return Line(name, x, y, limit=limit)


def _picture(panels: Any, folder: Path, name: str, axes: tuple[str, str], ticks: Sequence[float] = ()) -> str:
    if not panels:
        return ""
    path = folder / f"measured-{name}.png"
    plot_lines(panels, path, axes, "--page", ticks=ticks)
    return f"\n\n![{axes[1]} against {axes[0]}]({path.name})"


TableMaker = Callable[[Sequence[Found], Path], str]
TABLES: dict[str, TableMaker] = {
    "conditions": conditions,
    "claims": what_was_claimed,
    "emulation": emulation,
    "devices": devices,
    "eighths": eighths,
    "peers": peers,
    "rpc": rpc,
    "memory": memory,
    "network": network,
    "big": big,
    "predictions": predictions,
    "mixture_devices": mixture_devices,
    "mixture_predictions": mixture_predictions,
    "formats": formats,
}
