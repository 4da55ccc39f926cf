"""The devices of an emulated home, and the file that describes them: see hostfiles/emulated-home.toml."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpimpi.errors import InputError
from tpimpi.system.units import parse_size

NAMES = ("laptop", "desktop", "mini-pc", "pi", "tablet", "nas", "old-laptop", "media-box")
MAX_DEVICES = 64
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_DURATION = re.compile(r"([0-9.]+)\s*(us|ms|s)")
_BANDWIDTH = re.compile(r"([0-9.]+)\s*([kMG]?)(bit|B)/s")
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Link:
    """What a frame meets on its way: seconds one way, give or take `jitter_s`, and bytes a second; None: no limit."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth: float | None = None


@dataclass(frozen=True)
class Device:
    """One machine of the home. What is None is not limited, or for the link, as the home has it.

    `cores` (0.5: half a core), `memory` in bytes; `read_bps` and `write_bps`, bytes a second, of the disk that its cache is
    on; `disk`: bytes of a file system of its own, on which HOME and the cache are; `cache`: the folder for slices.
    """

    name: str
    cores: float | None = None
    memory: int | None = None
    read_bps: int | None = None
    write_bps: int | None = None
    disk: int | None = None
    cache: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    latency_s: float | None = None
    jitter_s: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"device name {self.name!r}: give 1 to 32 of a-z, 0-9 and - (not at the ends)")
        if self.cores is not None and not 0.01 <= self.cores <= 1024:
            raise InputError(f"cores of {self.name} is {self.cores}, must be between 0.01 and 1024")
        if self.disk is not None and self.cache is not None:
            raise InputError(f"device {self.name} has disk and cache; give one: the cache is on a disk of its own")
        for key in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise InputError(f"env of {self.name} has {key!r}, which is no name of a variable")


def equal_devices(n: int) -> list[Device]:
    """`n` devices without limits: laptop, desktop, mini-pc, pi, …"""
    if not 1 <= n <= MAX_DEVICES:
        raise InputError(f"{n} devices; give between 1 and {MAX_DEVICES}")
    return [Device(NAMES[i] if i < len(NAMES) else f"device-{i}") for i in range(n)]


def parse_duration(text: str, what: str) -> float:
    """Seconds that a user writes: 300us, 2ms, 0.5 s. Raises InputError, which names `what`."""
    match = _DURATION.fullmatch(text.strip())
    try:
        seconds = float(match[1]) * _SECONDS[match[2]] if match else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 60:
        raise InputError(f"{what} is {text[:40]!r}, must be a time up to 60 s such as 300us, 2ms or 0.1s")
    return seconds


def parse_bandwidth(text: str, what: str) -> float:
    """Bytes a second that a user writes: 300Mbit/s, 1Gbit/s, 40MB/s. Raises InputError, which names `what`."""
    match = _BANDWIDTH.fullmatch(text.strip())
    try:
        rate = float(match[1]) * _PREFIX[match[2]] / (8 if match[3] == "bit" else 1) if match else math.nan
    except ValueError:
        rate = math.nan
    if not 1000 <= rate < 1e12:
        raise InputError(f"{what} is {text[:40]!r}, must be a bandwidth from 1kB/s on such as 300Mbit/s or 40MB/s")
    return rate


def read_devices(path: Path) -> tuple[list[Device], Link]:
    """The devices that the file describes, and the link that they have unless they say otherwise. Raises InputError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file such as hostfiles/emulated-home.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    _only(data, {"link", "device"}, f"{path}")
    tables = data.get("device", [])
    if not isinstance(tables, list) or not 1 <= len(tables) <= MAX_DEVICES:
        raise InputError(f"{path}: there must be between 1 and {MAX_DEVICES} tables [[device]]")
    devices = [_device(table, f"{path}: device {i}", path.parent) for i, table in enumerate(tables)]
    names = [device.name for device in devices]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: two devices are called {', '.join(sorted(twice))}; give each a name of its own")
    table = data.get("link", {})
    _only(table, _LINK.keys(), f"{path}: link")
    return devices, Link(**{_LINK[key][0]: _LINK[key][1](_text(table, key, "link"), key) for key in table})


_LINK: dict[str, tuple[str, Any]] = {
    "latency": ("latency_s", parse_duration),
    "jitter": ("jitter_s", parse_duration),
    "bandwidth": ("bandwidth", parse_bandwidth),
}


def _device(table: Any, where: str, base: Path) -> Device:
    _only(table, {"name", "cores", "memory", "read", "write", "disk", "cache", "env", *_LINK}, where)
    values: dict[str, Any] = {"name": _text(table, "name", where)}
    where = f"{where} ({values['name']})"
    if "cores" in table:
        if not isinstance(table["cores"], int | float) or isinstance(table["cores"], bool):
            raise InputError(f"{where}: cores is {table['cores']!r}, must be a number such as 0.5")
        values["cores"] = float(table["cores"])
    for key in ("memory", "disk"):
        if key in table:
            values[key] = parse_size(_text(table, key, where), f"{where}: {key}")
    for key in ("read", "write"):
        if key in table:
            values[f"{key}_bps"] = round(parse_bandwidth(_text(table, key, where), f"{where}: {key}"))
    if "cache" in table:
        values["cache"] = (base / _text(table, "cache", where)).resolve()
    for key, (name, parse) in _LINK.items():
        if key in table:
            values[name] = parse(_text(table, key, where), f"{where}: {key}")
    env = table.get("env", {})
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise InputError(f"{where}: env must be a table of texts such as {{ OMP_NUM_THREADS = '1' }}")
    return Device(**values, env=env)


def _only(table: Any, known: Any, where: str) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{where} is {table!r}, must be a table")
    if unknown := sorted(table.keys() - set(known)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _text(table: dict[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {value!r}, must be a text in quotes")
    return value
