"""How results are shown: one of them, a table in Markdown, and numbers with no more digits than they are worth."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from bench.experiments.rows import repeat
from tpimpi.system.units import parse_size


class Found:
    """One result: its settings by [name], its figures, and the whole line."""

    def __init__(self, line: Mapping[str, Any]) -> None:
        self.line, self.figures = line, line["figures"]

    def __getitem__(self, key: str) -> Any:
        return self.line["settings"][key]

    @property
    def launch(self) -> str:
        """What started it, where it ran on real machines."""
        words = shlex.split(self.line["command"])
        return words[words.index("--launch") + 1] if "--launch" in words else ""

    @property
    def model(self) -> str:
        """Its shape and format."""
        layers = f" ({self['layers']} layers)" if self["layers"] else ""
        return f"{self['shape']}{layers} {self['format']}"

    @property
    def limit(self) -> int | None:
        """Of a device's memory, in bytes."""
        return parse_size(self["memory"], "memory") if self["memory"] else None

    @property
    def peak(self) -> int | None:
        """Of the device that took most, in bytes: of its group, page cache included, or of its process, whichever is larger.

        A group leaves out pages that another one read first (libraries), a process those of files that it did not map.
        """
        groups = self.figures.get("group_peak_bytes") or []
        own = self.figures.get("peak_rss_bytes")
        own = own if isinstance(own, list) else [own]
        return max((peak for peak in (*groups, *own) if peak), default=None)

    @property
    def asked(self) -> str:
        """What it was to do with in memory: a window, a device's limit, or --memory."""
        return f"window {self['window']}" if self["window"] else self["memory"] or self["budget"]

    @property
    def first_cold_s(self) -> float:
        """Seconds to the first token of the first prompt; other programs have it as ttft_s, and then ttft_warm_s."""
        return float(self.figures["ttft_cold_s" if "ttft_cold_s" in self.figures else "ttft_s"])


def of_measure(found: Iterable[Found], experiment: str, measure: str = "generate") -> list[Found]:
    """The results of one experiment that were measured in this way."""
    return [each for each in found if (each["experiment"], each["measure"]) == (experiment, measure)]


def by_network(found: Iterable[Found]) -> dict[tuple[str, str], dict[str, Found]]:
    """Whole runs over emulated networks: by latency and bandwidth, then by allreduce."""
    networks: dict[tuple[str, str], dict[str, Found]] = {}
    for each in found:
        if (each["experiment"], each["measure"]) == ("network", "generate"):
            networks.setdefault((each["latency"], each["bandwidth"]), {})[each["allreduce"]] = each
    return networks


class Table:
    """A table in Markdown."""

    def __init__(self, *columns: str) -> None:
        self._lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        self._columns = len(columns)

    def add(self, *cells: str) -> None:
        assert len(cells) == self._columns, cells
        self._lines.append(f"| {' | '.join(cells)} |")

    def __str__(self) -> str:
        return "\n".join(self._lines) if len(self._lines) > 2 else "Not measured yet."


def command_cell(found: Found, *, each: str = "") -> str:
    """What stands after `python -m bench.experiments run` to repeat it, or all that only differ in the setting `each`."""
    words = repeat(found.line["settings"], each=each, launch=found.launch)
    return f"`{words}`" if words else ""


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def per_token(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ms(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value * 1e3:.0f} ms"


def mb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f} MB"


def mbits(value: float | None) -> str:
    return "-" if value is None else f"{value * 8 / 1e6:.0f} Mbit/s"


def times(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
