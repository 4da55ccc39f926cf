"""`bench kernels`: how fast the linear kernels are, against what the machine's memory and multipliers allow.

Every kernel is timed on matrices that no cache holds: calls go round several copies where one is not large enough. All is
measured in rounds, a short turn for each kernel, for torch's F.linear, and for the two limits, so that whatever else the
machine does disturbs all of them alike; a figure is the median over its calls.

    GB/s      bytes of the packed matrix over the time of a call; its limit is the read bandwidth, with as many threads
    GFLOP/s   2 * rows * columns * positions over the time of a call, integer operations included; its limit is the multiply
              peak: what so many threads reach in registers, in f32, in bf16 or, for the quantized formats, in int8

torch is imported here only to be timed beside.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from tpimpi import __version__
from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend, has_native, load_backend
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.packed import Matrix, encode, pack, packed_bytes, row_bytes
from tpimpi.errors import InputError
from tpimpi.system.buffers import aligned_buffer
from tpimpi.system.cpu import amx_extensions, cpu_name, last_level_cache
from tpimpi.system.terminal import print_table as show_table
from tpimpi.system.units import show_minutes

if TYPE_CHECKING:
    from tpimpi.compute.backends.native import NativeBackend

ROUNDS = 5
CACHE_RATIO = 4  # the copies of a matrix together are so many times the last-level cache
TORCH = "torch F.linear"
_PATTERN_ROWS = 256  # rows of random weights, repeated: quantizing all of them would take longer than the measurement
_TORCH_FORMATS = ("f32", "bf16")
_METER_BYTES = 256 << 20  # read at least, to measure the bandwidth
_MAX_COPIES = 4096
_SLOW_CALL_S = 1.0  # seconds; a kernel that takes longer is called once


# What comes out


@dataclass(frozen=True)
class Limits:
    """The machine's, with the threads of the bench; None where there is no extension to measure them."""

    read_bandwidth: float | None  # bytes per second
    multiply_peak: Mapping[str, float]  # operations per second, by kind: f32, bf16, int8


@dataclass(frozen=True)
class Row:
    """One line of the table. Ratios are None where what they refer to was not measured."""

    backend: str
    format: str
    positions: int
    calls: int
    seconds: float  # median of the calls
    gb_per_s: float
    gflop_per_s: float
    of_read_bandwidth: float | None
    of_multiply_peak: float | None
    of_one_position: float | None  # the time, over that of one position


@dataclass(frozen=True)
class Timing:
    """How long the calls of one kernel took, in seconds."""

    backend: str
    format: str
    positions: int
    weight_bytes: int
    seconds: Sequence[float]


def make_rows(timings: Sequence[Timing], rows: int, columns: int, limits: Limits) -> list[Row]:
    """The table of a matrix [rows, columns], in the order of `timings`."""
    one = {(t.backend, t.format): median(t.seconds) for t in timings if t.positions == 1}
    table = []
    for t in timings:
        seconds = median(t.seconds)
        bandwidth, rate = t.weight_bytes / seconds, 2.0 * rows * columns * t.positions / seconds
        table.append(
            Row(
                backend=t.backend,
                format=t.format,
                positions=t.positions,
                calls=len(t.seconds),
                seconds=seconds,
                gb_per_s=bandwidth / 1e9,
                gflop_per_s=rate / 1e9,
                of_read_bandwidth=_over(bandwidth, limits.read_bandwidth),
                of_multiply_peak=_over(rate, limits.multiply_peak.get(FORMATS[t.format].activation_type)),
                of_one_position=_over(seconds, one.get((t.backend, t.format))),
            )
        )
    return table


def _over(value: float, limit: float | None) -> float | None:
    return value / limit if limit else None


def print_table(table: Sequence[Row], title: str, limits: Limits, amx: Sequence[str] | None = None) -> None:
    """The table, on stdout. `amx` are the matrix extensions of this processor, as `amx_extensions` finds them."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="none")
    shown.add_column("backend")
    shown.add_column("format")
    for name in ("positions", "ms", "/ 1 position", "GB/s", "/ read", "GFLOP/s", "/ peak"):
        shown.add_column(name, justify="right")

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    last: tuple[str, str] | None = None
    for r in table:
        if last is not None and last != (r.backend, r.format):
            shown.add_row()
        last = (r.backend, r.format)
        shown.add_row(
            *(r.backend, r.format, str(r.positions), f"{r.seconds * 1e3:.3f}", ratio(r.of_one_position)),
            *(f"{r.gb_per_s:.2f}", ratio(r.of_read_bandwidth), f"{r.gflop_per_s:.1f}", ratio(r.of_multiply_peak)),
        )
    print(title)
    if limits.read_bandwidth is not None:
        peaks = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in limits.multiply_peak.items())
        print(f"read bandwidth {limits.read_bandwidth / 1e9:.2f} GB/s; multiply peak, GFLOP/s: {peaks}")
    if names := ", ".join(amx_extensions() if amx is None else amx):
        print(f"this processor has AMX ({names}): the peak is without it, so torch, which uses it, may exceed the peak")
    print(
        "/ 1 position: of the time for one; / read, / peak: of the bandwidth and the peak (a noisy machine may exceed them)"
    )
    print()
    show_table(shown, 120)


# The machine


def machine(threads: int, backend: Backend) -> dict[str, Any]:
    """What was measured on, and with."""
    versions = {"tpimpi": __version__, "python": platform.python_version(), "numpy": np.__version__}
    if "torch" in sys.modules:
        versions["torch"] = str(sys.modules["torch"].__version__)
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache(threads),
        "system": platform.platform(),
        "amx": amx_extensions(),
        "kernel_level": getattr(backend, "level", None),
        "versions": versions,
    }


# Kernels


@dataclass
class _Kernel:
    """Something that is called and timed."""

    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def turn(self, budget: float) -> None:
        """Calls for `budget` seconds, at least one."""
        began = time.perf_counter()
        while True:
            start = time.perf_counter()
            self.call()
            end = time.perf_counter()
            self.seconds.append(end - start)
            if end - began >= budget:
                return


def _copies(nbytes: int, cache: int) -> int:
    """How many of `nbytes` are as large as so many caches; not more than _MAX_COPIES, which suffice for 32 KB each."""
    return min(max(1, -(-CACHE_RATIO * cache // nbytes)), _MAX_COPIES)


def _make_matrices(pattern: F32, rows: int, fmt: str, cache: int) -> list[Matrix]:
    """Copies of one matrix of `rows` rows, in memory like the window's."""
    stored = encode(pattern, fmt)
    stored = np.resize(stored, (rows, stored.shape[1]))
    packed = pack(stored, fmt, pattern.shape[1])
    copies = _copies(packed.data.nbytes, cache)
    memory = aligned_buffer(copies * packed.data.nbytes).reshape(copies, -1)
    memory[:] = packed.data
    return [Matrix(fmt, rows, pattern.shape[1], data) for data in memory]


def _ours(backend: Backend, matrices: Sequence[Matrix], x: F32) -> Callable[[], object]:
    turn = cycle(matrices)
    return lambda: backend.linear(x, next(turn))


def _torchs(
    pattern: F32, rows: int, inputs: Sequence[F32], threads: int, cache: int
) -> Iterable[tuple[str, int, int, Callable[[], object]]]:
    """(format, positions, bytes of the weights, call) of F.linear in f32 and bf16."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    for fmt in _TORCH_FORMATS:
        dtype = torch.float32 if fmt == "f32" else torch.bfloat16
        weight = torch.from_numpy(np.resize(pattern, (rows, pattern.shape[1]))).to(dtype)
        weights = weight.repeat(_copies(weight.nbytes, cache), 1, 1)
        for x in inputs:
            yield fmt, len(x), weight.nbytes, _torch_call(torch.from_numpy(x).to(dtype), weights)


def _torch_call(x: Any, weights: Any) -> Callable[[], object]:
    """F.linear of x [n, in] with each of `weights` [copies, out, in] in turn."""
    from torch.nn.functional import linear

    turn = cycle(weights.unbind())
    return lambda: linear(x, next(turn))


class _Meter:
    """Measures the machine's limits, with the extension's own loops: plain reads, and multiplications in registers."""

    def __init__(self, backend: NativeBackend, threads: int, nbytes: int, kinds: Iterable[str]) -> None:
        self._backend, self._threads = backend, threads
        self._memory = aligned_buffer(max(nbytes // _METER_BYTES, 1) * _METER_BYTES)
        self._memory[:] = 1  # pages that were never written may all be one and the same
        self._reading = _Kernel(lambda: backend.read(self._memory))
        self._peaks: dict[str, list[float]] = {kind: [] for kind in kinds}

    @property
    def limits_measured(self) -> int:
        return 1 + len(self._peaks)

    def turn(self, seconds: float) -> None:
        """Measure each limit for about so long."""
        self._reading.turn(seconds)
        for kind, found in self._peaks.items():
            found.append(self._backend.multiply_peak("q8_0" if kind == "int8" else kind, seconds))

    def limits(self) -> Limits:
        """The medians so far."""
        peaks = {kind: median(found) * self._threads for kind, found in self._peaks.items()}
        return Limits(self._memory.nbytes / median(self._reading.seconds), peaks)


# The bench


def duration(formats: Sequence[str], positions: Sequence[int], seconds: float) -> str:
    """A line that says before anything is measured how long that will take at least."""
    with_torch = importlib.util.find_spec("torch") is not None
    count = (len(formats) + (len(_TORCH_FORMATS) if with_torch else 0)) * len(positions)
    return (
        f"timing {count} kernels for {seconds:g} s each: {show_minutes(count * seconds)} at least, and about four times "
        "that where calls are long (many positions); fewer --formats or --positions, or less of --seconds, is shorter"
    )


def choose_backend(wanted: str | None) -> tuple[str, str]:
    """The backend to bench, and a line to say, or "", where it is not the one that a user would expect."""
    if wanted not in (None, "auto"):
        return str(wanted), ""
    if has_native():
        return "native", ""
    instead = "torch" if importlib.util.find_spec("torch") is not None else "numpy"
    return instead, f"native kernels are not installed; timing backend {instead}, without the machine's limits"


class Bench:
    """The kernels of one backend, and torch's beside them, ready to be timed."""

    def __init__(
        self,
        backend: str,
        formats: Sequence[str],
        positions: Sequence[int],
        shape: tuple[int, int],
        threads: int,
        level: str = "auto",
    ) -> None:
        """`shape` is the matrix's (rows, columns), `level` one of KERNEL_LEVELS, or auto.

        Raises InputError where memory is too small for the matrices."""
        self.rows, self.columns = shape
        self.threads = threads
        cache = last_level_cache(threads)
        with_torch = importlib.util.find_spec("torch") is not None
        self._check_memory(formats, positions, cache, with_torch)
        self.backend = load_backend(backend, threads, level)
        rng = np.random.default_rng(0)
        pattern = (rng.standard_normal((min(self.rows, _PATTERN_ROWS), self.columns)) * 0.02).astype(np.float32)
        inputs = [rng.standard_normal((count, self.columns)).astype(np.float32) for count in positions]
        self._kernels: list[tuple[str, str, int, int, _Kernel]] = []
        for fmt in formats:
            matrices = _make_matrices(pattern, self.rows, fmt, cache)
            for x in inputs:
                kernel = _Kernel(_ours(self.backend, matrices, x))
                self._kernels.append((self.backend.name, fmt, len(x), matrices[0].data.nbytes, kernel))
        if with_torch:
            for fmt, count, nbytes, call in _torchs(pattern, self.rows, inputs, threads, cache):
                self._kernels.append((TORCH, fmt, count, nbytes, _Kernel(call)))
        kinds = [FORMATS[fmt].activation_type for fmt in (*formats, *(_TORCH_FORMATS if with_torch else ()))]
        self._meter: _Meter | None = None
        if self.backend.name == "native":
            from tpimpi.compute.backends.native import NativeBackend

            assert isinstance(self.backend, NativeBackend)
            self._meter = _Meter(self.backend, threads, CACHE_RATIO * cache, kinds)

    def _check_memory(self, formats: Sequence[str], positions: Sequence[int], cache: int, with_torch: bool) -> None:
        sizes = [packed_bytes(fmt, self.rows, self.columns) for fmt in formats]
        if with_torch:
            sizes += [self.rows * row_bytes(fmt, self.columns) for fmt in _TORCH_FORMATS]
        needed = sum(size * _copies(size, cache) for size in sizes) + 2 * max(sizes)
        needed += 4 * (sum(positions) * self.columns + max(positions) * self.rows)
        free = psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"the matrices take {needed / 1e9:.1f} GB, this machine has {free / 1e9:.1f} GB of memory free; "
                "give fewer --formats or --positions, or a smaller --shape"
            )

    def run(self, seconds: float, progress: Callable[[str], None]) -> tuple[list[Row], Limits]:
        """Time each kernel for about `seconds`; progress(line) is called with how far it is, and how long it will take."""
        slow: set[int] = set()
        left = 0.0  # seconds, of all rounds
        for *_, kernel in self._kernels:  # the first call of each finds memory and code cold
            kernel.turn(0)
            if kernel.seconds[0] < max(seconds, _SLOW_CALL_S):
                left += max(seconds, ROUNDS * kernel.seconds[0])
                kernel.seconds.clear()
            else:
                slow.add(id(kernel))
        if self._meter is not None:
            left += seconds * self._meter.limits_measured
        for number in range(ROUNDS):
            progress(f"round {number + 1} of {ROUNDS}, about {show_minutes(left)} left")
            began = time.perf_counter()
            if self._meter is not None:
                self._meter.turn(seconds / ROUNDS)
            for *_, kernel in self._kernels:
                if id(kernel) not in slow:
                    kernel.turn(seconds / ROUNDS)
            left = (time.perf_counter() - began) * (ROUNDS - 1 - number)
        timings = [Timing(name, fmt, count, size, k.seconds) for name, fmt, count, size, k in self._kernels]
        limits = Limits(None, {}) if self._meter is None else self._meter.limits()
        return make_rows(timings, self.rows, self.columns, limits), limits

    def as_json(self, table: Sequence[Row], limits: Limits) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "machine": machine(self.threads, self.backend),
            "threads": self.threads,
            "shape": [self.rows, self.columns],
            "read_bandwidth": limits.read_bandwidth,
            "multiply_peak": dict(limits.multiply_peak),
            "rows": [asdict(row) for row in table],
        }

    def title(self) -> str:
        """What was measured, in one line."""
        level = getattr(self.backend, "level", None)
        return (
            f"{cpu_name()} · {self.backend.name}{f' {level}' if level else ''} · {self.threads} thread"
            f"{'s' if self.threads > 1 else ''} · matrix {self.rows}x{self.columns}"
        )
