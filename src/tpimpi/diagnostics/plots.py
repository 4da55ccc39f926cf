"""Pictures: the memory of each rank over time (`--plot`), a stretch of a trace (bench/studies/draw_trace.py), and lines.

matplotlib is an optional extra, imported only when something is drawn: it takes 45 to 60 MB.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpimpi.errors import InputError, shorten_path
from tpimpi.system.files import check_writable, replacing
from tpimpi.system.own_files import DOTS_PER_INCH, PICTURE, SOFTWARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_PANELS = 24  # ranks whose memory is drawn
MAX_DRAWN = 20_000  # spans of a trace
LONGEST_LABEL = 24  # characters
SHORT_DECADES = 3.2  # of a logarithmic axis that has more than powers of ten

_LEGEND_FONT_POINTS = 10  # matplotlib's own size of letters in a legend
_LEGEND_MARGIN_INCHES = 0.7  # inches: a line's sample and the gaps
_INK, _GRID = "#1a202c", "#e2e8f0"
_PINNED, _BUFFERS, _REST, _PROMISE = "#2b6cb0", "#ed8936", "#cbd5e0", "#c53030"
_LINES = ("#c53030", "#2b6cb0", "#2f855a", "#ed8936", "#805ad5", "#718096", "#319795")
# For each kind a shade for attention and the head, and one for the MLP.
_SHADES = {
    "read": ("#ed8936", "#f6ad55"),
    "compute": ("#2b6cb0", "#63a4dd"),
    "star": ("#2f855a", "#68b48c"),
    "disk wait": ("#c53030", "#e57373"),
}


@dataclass(frozen=True)
class Timeline:
    """The memory of one rank: points [t, resident, pinned, buffers], t in seconds on one clock for all ranks, the rest in
    bytes; `promise` is what it may take at most, None where nothing was promised."""

    label: str
    points: Sequence[Sequence[float]]
    promise: int | None = None


def check_plot(given: str, option: str = "--plot", inputs: Sequence[str] = ()) -> None:
    """Raise InputError, before any work is done, where a PNG could not be drawn, or not be written to `given`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{option} needs matplotlib, which is not installed; do: pip install 'matplotlib>=3.8'")
    if Path(given).suffix.lower() not in ("", ".png"):
        raise InputError(f"{option} {shorten_path(given)}: the picture is a PNG; give a name that ends in .png")
    check_writable(given, option, inputs, PICTURE)


# Memory


def plot_memory(timelines: Sequence[Timeline], path: Path, option: str = "--plot") -> None:
    """Draw a panel for each rank as a PNG, the first MAX_PANELS of them. Raises StorageError."""
    assert timelines
    shown = timelines[:MAX_PANELS]
    columns = len(shown) if len(shown) <= 3 else 2 if len(shown) == 4 else min(4, -(-len(shown) // 2))
    rows = -(-len(shown) // columns)
    figure = _figure(max(7.0, 3.4 * columns), 1.0 + 2.6 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    began = min((point[0] for timeline in shown for point in timeline.points), default=0.0)
    peak = max((max(point[1], point[2] + point[3]) for t in shown for point in t.points), default=0.0)
    # A promise far above what is used would leave the rest flat: it stands in the title alone.
    near = [t.promise for t in shown if t.promise is not None and t.promise < 2.5 * peak]
    top = max([peak, *near]) * 1.08 / 1e6 or 1.0
    panels: list[Axes] = list(grid.flat)
    for panel, timeline in zip(panels, shown, strict=False):
        _draw_memory(panel, timeline, began, top)
    panels[0].set_ylim(0, top)
    panels[0].set_xlim(left=0)
    for index, panel in enumerate(panels):
        panel.set_visible(index < len(shown))
        if index + columns >= len(shown) and index < len(shown):  # the lowest of its column
            panel.set_xlabel("seconds", color=_INK)
            panel.tick_params(labelbottom=True)
        if index % columns == 0:
            panel.set_ylabel("MB", color=_INK)
    entries = {label: handle for panel in reversed(panels) for handle, label in zip(*_legend_of(panel), strict=True)}
    title = f"the first {len(shown)} of {len(timelines)} ranks" if len(shown) < len(timelines) else None
    figure.legend(
        list(entries.values()), list(entries), loc="outside upper center", ncols=5, frameon=False, title=title
    )
    _write(figure, path, "png", option)


def _draw_memory(panel: Axes, timeline: Timeline, began: float, top: float) -> None:
    """One rank's panel, from `began` (s) on, and up to `top` (MB)."""
    times = [point[0] - began for point in timeline.points]
    resident, pinned, buffers = ([point[column] / 1e6 for point in timeline.points] for column in (1, 2, 3))
    both = [a + b for a, b in zip(pinned, buffers, strict=True)]
    title = _label(timeline.label)
    if times:
        title += f" · peak {max(resident):.0f} MB"
        panel.fill_between(times, 0, pinned, color=_PINNED, linewidth=0, label="pinned")
        panel.fill_between(times, pinned, both, color=_BUFFERS, linewidth=0, label="buffers")
        rest = [max(a, b) for a, b in zip(resident, both, strict=True)]
        panel.fill_between(times, both, rest, color=_REST, linewidth=0, label="all the rest")
        # A single point has no length to be drawn as a line.
        panel.plot(times, resident, color=_INK, linewidth=1.3, label="resident", marker="." if len(times) == 1 else "")
    else:
        panel.text(0.5, 0.5, "nothing was noted", transform=panel.transAxes, ha="center", color=_INK)
    if (promise := timeline.promise) is not None:
        title += f" of {promise / 1e6:.0f}" if times else f" · {promise / 1e6:.0f} MB"
    if promise is not None and promise / 1e6 < top:
        panel.axhline(promise / 1e6, color=_PROMISE, linestyle=(0, (5, 3)), linewidth=1.3, label="promise")
    panel.set_title(title, loc="left", fontsize=9.5, color=_INK, parse_math=False)
    panel.grid(axis="y", color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)


def _legend_of(panel: Axes) -> tuple[list[Any], list[Any]]:
    handles, labels = panel.get_legend_handles_labels()
    return list(handles), list(labels)


# A stretch of a trace


class _Bar(NamedTuple):
    """A span as it is drawn, in seconds of the trace."""

    kind: str
    name: str
    began: float
    ended: float


def plot_trace(trace: Mapping[str, Any] | Path, path: Path, begin: float, end: float) -> None:
    """Draw what happened from `begin` to `end`, in seconds of a trace (or its file), as the SVG or PNG that `path` names.

    Memory: that of the whole trace as Python objects. Raises InputError where there is nothing to draw, StorageError.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in ("svg", "png"):
        raise InputError(f"the picture {path} must end in .svg or .png; choose another name")
    if not -math.inf < begin < end < math.inf:
        raise InputError(f"the stretch from {begin:g} s to {end:g} s has no length; give a beginning before its end")
    lanes = _lanes(read_trace(trace) if isinstance(trace, Path) else trace, begin, end)
    count = sum(len(bars) for bars in lanes.values())
    if not 0 < count <= MAX_DRAWN:
        what = f"has {count} spans, over {MAX_DRAWN}" if count else "has no spans"
        raise InputError(f"the stretch from {begin:g} s to {end:g} s {what}; choose another")
    _write(_draw_lanes(lanes, begin, end), path, form, "picture")


def read_trace(path: Path) -> dict[str, Any]:
    """A trace from its file. Raises InputError where it is none."""
    try:
        trace = json.loads(path.read_bytes())
        if not isinstance(trace["traceEvents"], list):
            raise TypeError("traceEvents is no list")
        return dict(trace)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that --trace wrote") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{path} is no trace ({error!r}); give a file that --trace wrote") from error


def _lanes(trace: Mapping[str, Any], begin: float, end: float) -> dict[tuple[str, str], list[_Bar]]:
    """(rank, lane) -> its spans within the stretch; ranks in their order, each with its lanes from reading to waiting.

    Which thread read what is not told: reads take as many lanes as there were at once.
    """
    ranks: dict[int, str] = {}
    found: dict[tuple[int, int], list[_Bar]] = defaultdict(list)
    order = ("read", "compute", "star", "disk wait")
    try:
        for event in trace["traceEvents"]:
            if event["ph"] == "M" and event["name"] == "process_name":
                ranks[event["pid"]] = str(event["args"]["name"])
            elif event["ph"] == "X" and event["cat"] in order:
                began, ended = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
                if began < end and ended > begin:
                    bar = _Bar(event["cat"], str(event["name"]), max(began, begin), min(ended, end))
                    found[event["pid"], order.index(bar.kind)].append(bar)
    except (TypeError, LookupError) as error:
        raise InputError(
            f"the trace has an event that makes no sense ({error!r}); give one that --trace wrote"
        ) from error
    lanes: dict[tuple[str, str], list[_Bar]] = {}
    for pid, place in sorted(found):
        for number, bars in enumerate(_one_at_a_time(found[pid, place]), start=1):
            lanes[ranks.get(pid, f"r{pid}"), f"{number} at once" if number > 1 else order[place]] = bars
    return lanes


def _one_at_a_time(bars: Sequence[_Bar]) -> list[list[_Bar]]:
    """The spans on as few lanes as have no two of them at the same time."""
    lanes: list[list[_Bar]] = []
    for bar in sorted(bars, key=lambda bar: bar.began):
        free = next((lane for lane in lanes if lane[-1].ended <= bar.began), None)
        if free is None:
            lanes.append(free := [])
        free.append(bar)
    return lanes


def _draw_lanes(lanes: Mapping[tuple[str, str], Sequence[_Bar]], begin: float, end: float) -> Figure:
    """The picture: a bar for each span, and a block's name where there is room for it. Time runs in milliseconds."""
    gap, width = 0.7, 11.0  # between ranks, in lanes; of the picture, in inches
    ranks = {rank: [key for key in lanes if key[0] == rank] for rank, _ in lanes}
    places: dict[tuple[str, str], float] = {}
    y = 0.0
    for keys in ranks.values():
        places |= {key: y + index for index, key in enumerate(keys)}
        y += len(keys) + gap
    figure = _figure(width, 0.8 + 0.27 * y)
    axes = figure.subplots()
    for key, bars in lanes.items():
        _draw_bars(axes, bars, places[key], begin, (end - begin) / (width - 1.6))
    for rank, keys in ranks.items():
        middle = (places[keys[0]] + places[keys[-1]] + 1) / 2
        axes.annotate(
            _label(rank),
            (0, middle),
            xytext=(-62, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontweight="bold",
            fontsize=9,
            color=_INK,
            parse_math=False,
        )
    axes.set_ylim(y - gap, 0)
    axes.set_xlim(0, (end - begin) * 1e3)
    axes.set_yticks([place + 0.5 for place in places.values()], [_label(lane) for _, lane in places], parse_math=False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel(f"milliseconds from {begin:g} s of the trace", color=_INK)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["left"]].set_visible(False)
    return figure


def _draw_bars(axes: Axes, bars: Sequence[_Bar], y: float, begin: float, inch: float) -> None:
    """One lane, from `begin` on; an inch of the picture is about `inch` seconds."""
    for run in _runs(bars, inch / 50):
        kind, name, light = run[0].kind, run[0].name, run[0].name.endswith("mlp")
        spans = [((bar.began - begin) * 1e3, (bar.ended - bar.began) * 1e3) for bar in run]
        shade = _SHADES[kind][light]
        axes.broken_barh(spans, (y + 0.06, 0.88), facecolors=shade, edgecolors="white", linewidth=0.25)
        text = _label(name.removeprefix("layer "))
        if kind in ("read", "compute") and run[-1].ended - run[0].began > 0.08 * len(text) * inch:  # a letter's width
            axes.text(
                ((run[0].began + run[-1].ended) / 2 - begin) * 1e3,
                y + 0.52,
                text,
                ha="center",
                va="center_baseline",
                fontsize=7.5,
                color="white" if kind == "compute" and not light else _INK,
                parse_math=False,
            )


def _runs(bars: Sequence[_Bar], gap: float) -> Iterator[Sequence[_Bar]]:
    """Spans of a lane that follow one another within one block, less than `gap` seconds apart."""
    first = 0
    for after in range(1, len(bars) + 1):
        last = bars[after - 1]
        if after == len(bars) or bars[after][:2] != last[:2] or bars[after].began - last.ended > gap:
            yield bars[first:after]
            first = after


# Lines


@dataclass(frozen=True)
class Line:
    """One line of a panel: points (x[i], y[i]), over 0. A `limit` is drawn as one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    limit: bool = False


def plot_lines(
    panels: Sequence[tuple[str, Sequence[Line]]],
    path: Path,
    axes_are: tuple[str, str],
    option: str = "--plot",
    *,
    ticks: Sequence[float] = (),
) -> None:
    """Draw panels (title, lines) in rows of up to three as a PNG or SVG, both axes logarithmic and called `axes_are`;
    `ticks` are the numbers along x, where not 1, 2, 5, 10, … A label has the same colour in all. Raises StorageError."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = 1.4 + 4.4 * columns
    figure = _figure(width, 0.8 + 3.6 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    labels = list(dict.fromkeys(line.label for _, lines in panels for line in lines if not line.limit))
    handles: dict[str, Any] = {}
    for unused in grid.flat[len(panels) :]:
        unused.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels, strict=False):
        for line in lines:
            if line.limit:
                look: dict[str, Any] = {"color": _INK, "linestyle": (0, (5, 3)), "linewidth": 1.3}
            else:
                look = {"color": _LINES[labels.index(line.label) % len(_LINES)], "marker": ".", "linewidth": 1.6}
            handles[line.label] = axes.plot(line.x, line.y, label=_label(line.label), **look)[0]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=9.5, color=_INK, parse_math=False)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grid.flat[: len(panels)]:  # once all is drawn: they share their axes
        _number(axes.yaxis)
        _number(axes.xaxis)
        if ticks:
            axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of its column
        axes.set_xlabel(axes_are[0], color=_INK)
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(axes_are[1], color=_INK)
    names = [_label(label) for label in handles]
    ncols = max(1, int(width / (_LEGEND_MARGIN_INCHES + max(map(_text_width, names), default=0.0))))
    figure.legend(list(handles.values()), names, loc="outside upper center", ncols=ncols, frameon=False)
    _write(figure, path, path.suffix.lower().removeprefix(".") or "png", option)


def _text_width(text: str) -> float:
    """Of a label in a legend, in inches."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=_LEGEND_FONT_POINTS).get_extents().width) / 72 if text.strip() else 0.0


def _number(axis: Axis) -> None:
    """Numbers along a logarithmic axis: 1, 2, 5, 10, … where it is short, which would have one or two by itself."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    least, most = sorted(axis.get_view_interval())
    short = most < 10**SHORT_DECADES * least
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if short:
        axis.set_minor_locator(NullLocator())


# All of them


def _figure(width: float, height: float) -> Figure:
    """An empty picture of so many inches; no window, and nothing of matplotlib's global state."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would tell of its caches on stderr
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(text: str) -> str:
    """Text that every font has, and of bearable length."""
    plain = text.encode("ascii", "backslashreplace").decode("ascii")
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in plain)
    return plain if len(plain) <= LONGEST_LABEL else plain[: LONGEST_LABEL - 3] + "..."


def _write(figure: Figure, path: Path, form: str, option: str) -> None:
    import matplotlib

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    data = io.BytesIO()
    # Text stays text in an SVG, and the same picture gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tpimpi", "font.family": "sans-serif"}):
        metadata = {"Date": None} if form == "svg" else {"Software": SOFTWARE}
        figure.savefig(data, format=form, dpi=DOTS_PER_INCH, facecolor="white", metadata=metadata)
    with replacing(path, option) as file:
        file.write(data.getbuffer())
