"""The rows of experiments.toml: read, multiplied out, chosen from, and how long one is likely to take."""

from __future__ import annotations

import functools
import itertools
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench.home.devices import parse_bandwidth, parse_duration
from tpimpi.cli.values import AUTO, share_weights
from tpimpi.diagnostics.planner.loads import Loads
from tpimpi.errors import InputError
from tpimpi.models.shapes import SHAPES, load_shape
from tpimpi.models.weight_formats import FORMAT_CHOICES, ModelFormats
from tpimpi.system.units import parse_size
from tpimpi.weights.slices.partition import make_partition

ROWS_FILE = Path(__file__).with_name("experiments.toml")
SIZES = ("full", "quick", "smallest")
MEASURES = ("generate", "peer", "allreduce", "perplexity", "predict", "emulation", "ways")
MEASURES_ON_MACHINES = ("generate", "allreduce", "perplexity", "predict")  # what can do without an emulated home
# On real machines no limits are set: these settings then have these values.
UNLIMITED: dict[str, Any] = {"cores": None, "memory": "", "read": "", "latency": "", "bandwidth": "", "threads": 0}
CORE_BYTES_PER_S = 8e9  # weights that a core goes through, roughly
LAUNCHER_BYTES = 48_000_000  # of a device's memory, for mpirun and its daemons
SLICES_BYTES_PER_S = 4e8  # that synth writes, roughly
ANSWER_S = 20.0  # that the tokens of an answer take, where the row leaves their number open


@dataclass(frozen=True)
class Row:
    """One run and its settings, as experiments.toml explains them; an empty text or 0 is no wish and no limit."""

    experiment: str
    measure: str
    program: str
    mpi: str
    shape: str
    layers: int
    format: str
    devices: int
    shares: str
    cores: float | None
    memory: str
    read: str
    latency: str
    bandwidth: str
    allreduce: str
    budget: str
    window: str
    context: int
    prompt: int
    tokens: int
    threads: int

    def settings(self) -> dict[str, Any]:
        """All of it, as it is kept with a result."""
        return asdict(self)

    @property
    def memory_bytes(self) -> int | None:
        return parse_size(self.memory, "memory") if self.memory else None

    @property
    def read_bps(self) -> int | None:
        return round(parse_bandwidth(self.read, "read")) if self.read else None

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """The bytes of weights that each rank goes through for a token; none where the shape is none of synth's.

        Shares that are for `plan` to choose count as equal ones.
        """
        if self.shape not in SHAPES:
            return ()
        shares = "" if self.shares == AUTO else self.shares
        return _rank_bytes(self.shape, self.layers, self.format, self.devices, shares)

    @property
    def model_bytes(self) -> int:
        """The same of all ranks: the model's weights, without the embedding."""
        return sum(self.rank_bytes)

    @property
    def room_bytes(self) -> int:
        """About the memory that a device has for weights."""
        if self.window or self.budget == "least":
            return 0
        sizes = [size for size in (self.memory, self.budget) if size not in ("", "fit")]
        return min((parse_size(size, "memory") for size in sizes), default=1 << 60)

    @property
    def pass_s(self) -> float:
        """About the seconds that one pass through the weights takes: the rank that has most of them."""
        part = max(self.rank_bytes, default=0)
        computing = part / ((self.cores or 2 / self.devices) * CORE_BYTES_PER_S)
        reading = max(0.0, part - self.room_bytes) / self.read_bps if self.read_bps else 0.0
        return max(computing, reading) + 0.05

    @property
    def answer_tokens(self) -> int:
        """Of each answer."""
        return self.tokens or min(16, max(2, round(ANSWER_S / self.pass_s)))

    @property
    def expected_s(self) -> float:
        """About the seconds that the row takes, without making slices."""
        if self.measure == "allreduce":
            return 5 + 80 * self.hub_s(4 * 524_288)  # a prompt of 128 positions, by every algorithm
        if self.measure == "perplexity":
            return 5 + self.prompt / 60
        if self.measure in ("emulation", "ways"):
            return 25.0
        if self.measure == "predict":
            return 2.0
        answer = self.answer_tokens * (self.pass_s + self.sums_s(1)) + self.sums_s(self.prompt)
        return 8 + 2 * answer * (1 if self.measure == "generate" else 2)

    def sums_s(self, positions: int) -> float:
        """About the seconds that the sums of a pass over so many positions take, by the star."""
        if self.devices < 2 or self.shape not in SHAPES:
            return 0.0
        config = load_shape(self.shape, self.layers or None).config
        latency = parse_duration(self.latency, "latency") if self.latency else 0.0
        return 2 * config.layers * (2 * latency + self.hub_s(4 * config.hidden * positions))

    def hub_s(self, size: int) -> float:
        """The seconds that partial results of so many bytes need on the hub's link."""
        return (self.devices - 1) * size / parse_bandwidth(self.bandwidth, "bandwidth") if self.bandwidth else 0.0

    @property
    def slices(self) -> str:
        """Which slices or model file it needs: the same text, the same files. Empty: none of synth's."""
        if self.shape not in SHAPES or self.measure in ("predict", "allreduce", "emulation"):
            return ""
        name = f"{self.shape}{f'-{self.layers}' if self.layers else ''}"
        if self.measure == "peer":
            return f"{name}.{'gguf' if self.program.startswith('llama.cpp') else 'hf'}.{self.format}"
        chosen = (
            f"{self.shares}-{self.cores}-{self.memory}-{self.read.replace('/', '')}" if self.planned else self.shares
        )
        return f"{name}.{self.format}.{self.devices}{f'.{chosen}' if chosen and self.devices > 1 else ''}"

    @property
    def planned(self) -> bool:
        """Whether its shares are for `plan` to choose."""
        return self.measure == "generate" and self.shares == "auto" and self.devices > 1


@functools.cache
def _rank_bytes(shape: str, layers: int, fmt: str, devices: int, shares: str) -> tuple[int, ...]:
    config = load_shape(shape, layers or None).config
    loads = Loads(config, ModelFormats.for_model(fmt, config))
    plan = make_partition(config, share_weights(shares or None, devices))
    return tuple(loads.load(share, rank).token for rank, share in enumerate(plan.shares))


# By these a row is told from the others of its experiment, the first that does.
VARIED = (
    "measure",
    "program",
    "shape",
    "format",
    "devices",
    "memory",
    "latency",
    "bandwidth",
    "allreduce",
    "budget",
    "window",
)
_TYPES = {field.name: str(field.type) for field in fields(Row)}


def read_rows(size: str = "full", path: Path = ROWS_FILE) -> list[Row]:
    """All rows of a size, in the order of the file. Raises InputError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    rows = [
        row
        for number, table in enumerate(data.get("rows", []))
        for row in _expand(data["settings"], table, size, f"{path}: rows {number}")
    ]
    return list(dict.fromkeys(rows))


def _expand(common: dict[str, Any], table: dict[str, Any], size: str, where: str) -> list[Row]:
    own = {key: value for key, value in table.items() if key not in SIZES}
    change = table.get(size, {}) if size != "full" else {}
    if change is False:
        return []
    settings = {**common, **own, **change}
    if unknown := settings.keys() - _TYPES.keys():
        raise InputError(f"{where}: unknown setting {', '.join(sorted(unknown))}; known are {', '.join(_TYPES)}")
    lists = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [_row(dict(zip(settings, values, strict=True)), where) for values in itertools.product(*lists)]


def _row(settings: dict[str, Any], where: str) -> Row:
    for key, kind in _TYPES.items():
        value = settings.get(key)
        if kind.startswith("float"):
            settings[key] = None if value == "" else float(settings[key])
        elif kind == "int" and not (isinstance(value, int) and value >= 0):
            raise InputError(f"{where}: {key} is {value!r}, must be a whole number")
        elif kind == "str":
            settings[key] = str(value)
    row = Row(**settings)
    if row.measure not in MEASURES:
        raise InputError(f"{where}: measure is {row.measure!r}, must be one of {', '.join(MEASURES)}")
    if row.format not in FORMAT_CHOICES:
        raise InputError(f"{where}: format is {row.format!r}, must be one of {', '.join(FORMAT_CHOICES)}")
    return row


def choose(rows: Iterable[Row], experiments: Sequence[str], only: str) -> list[Row]:
    """The rows of these experiments (none: of all) whose settings are as `only` says: "shape=llama-2-7b devices=1,4".

    Raises InputError for what no row has.
    """
    rows = list(rows)
    known = list(dict.fromkeys(row.experiment for row in rows))
    for name in experiments:
        if name not in known:
            raise InputError(f"no experiment {name!r} here; there are {', '.join(known)}")
    chosen = [row for row in rows if not experiments or row.experiment in experiments]
    try:
        wishes = shlex.split(only)
    except ValueError as error:
        raise InputError(f"--only is {only!r}: {error}") from error
    for wish in wishes:
        key, sign, values = wish.partition("=")
        if key not in _TYPES or not sign:
            raise InputError(f"--only has {wish!r}, must be such as shape=llama-2-7b; settings are {', '.join(_TYPES)}")
        there = list(dict.fromkeys(_show(row, key) for row in chosen))
        wanted = [values] if values in there else values.split(",")
        if missing := [value for value in wanted if value not in there]:
            raise InputError(f"--only has {key}={missing[0]}; the rows left have {', '.join(there) or 'none'}")
        chosen = [row for row in chosen if _show(row, key) in wanted]
    return chosen


def _show(row: Row, key: str) -> str:
    return _text(getattr(row, key))


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def on_machines(rows: Sequence[Row], ranks: int) -> list[Row]:
    """The rows as they can run on real machines: without limits, each once."""
    fit = [row for row in rows if row.measure in MEASURES_ON_MACHINES and row.devices <= ranks]
    return list(dict.fromkeys(replace(row, **UNLIMITED) for row in fit))


def repeat(settings: Mapping[str, Any], *, each: str = "", launch: str = "") -> str:
    """What measures just the row with these settings, or those that only differ from it in the setting `each`: the end of a
    command, from the experiment's name on; "" where there is no such row in experiments.toml any more.

    Of a row that ran on real machines `launch` is the launcher; where that is not known, … stands for it.
    """
    own = dict(settings)
    for machines in (False, True) if not launch else (True,):
        keys = [key for key in (*VARIED, *_TYPES) if key != each and not (machines and key in UNLIMITED)]
        for size in SIZES:
            rows = [row for row in _all_rows(size) if row.experiment == own["experiment"]]
            if machines:  # --only chooses before limits are left out, so by what is no limit
                rows = [row for row in rows if on_machines([row], row.devices)]
            there = [row.settings() for row in rows]
            if own not in [{**row, **UNLIMITED} if machines else row for row in there]:
                continue
            words = []
            for key in keys:
                if len({str(row[key]) for row in there}) > 1:
                    words.append(f"{key}={_text(own[key])}")
                    there = [row for row in there if row[key] == own[key]]
            command: str = own["experiment"] + ("" if size == "full" else f" --{size}")
            command += f" --only {shlex.quote(shlex.join(words))}" if words else ""
            return command + (f" --launch {shlex.quote(launch or '…')} --ranks {own['devices']}" if machines else "")
    return ""


@functools.cache
def _all_rows(size: str) -> list[Row]:
    return read_rows(size)
