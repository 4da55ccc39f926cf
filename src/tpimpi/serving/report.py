"""What a run measured: a table for people, JSON for programs."""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tpimpi.errors import InputError, StorageError
from tpimpi.system.memory import show_size

_LIMITED_BY_DISK = 0.3  # of a rank's time, waited for the disk


@dataclass(frozen=True)
class RankFigures:
    """One rank's part of the report. Times in seconds, over the whole run.

    `memory_bytes` is what --memory promised or found, None under --window. `pinned_bytes` and `buffer_bytes` are the
    tiles that were kept at the end, and the ring; `streamed_bytes_per_token` is what was not kept, `device` the disk it
    is on (st_dev), `disk_bytes_per_s` what the disk gave at the start (0 where it was not measured). `timeline` has
    [seconds, resident, pinned, buffers], in bytes. Of the peak memory, `weights_bytes` are tiles in the window,
    `cache_bytes` keys and values, `tokenizer_bytes` what the tokenizer took (rank 0), and `base_bytes` all the rest:
    Python, libraries, activations.
    """

    rank: int
    host: str
    heads: int
    kv_heads: int
    columns: int
    memory_bytes: int | None
    peak_rss_bytes: int
    weights_bytes: int
    cache_bytes: int
    tokenizer_bytes: int
    base_bytes: int
    pinned_bytes: int
    buffer_bytes: int
    streamed_bytes_per_token: int
    device: int
    disk_bytes_per_s: float
    bytes_read: int
    read_wait_s: float
    compute_s: float
    star_s: float
    timeline: list[list[float]]


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt. `ttft_s` is from the prompt being ready to the first token (None where there was none),
    `s_per_token` the median time between two tokens (None with fewer than two)."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    ttft_s: float | None
    s_per_token: float | None

    @classmethod
    def timed(cls, text: str, token_ids: list[int], prompt_tokens: int, ready: float, times: list[float]) -> Answer:
        """From the monotonic times of the prompt being ready and of each token."""
        gaps = [b - a for a, b in itertools.pairwise(times)]
        first = times[0] - ready if times else None
        return cls(text, token_ids, prompt_tokens, first, median(gaps) if gaps else None)


def check_writable(
    given: str, option: str = "--report", inputs: Sequence[str] = (), *, start: bytes = b"{", kind: str = "report"
) -> None:
    """Raise InputError, before any work is done, where a report could not be written to `given`, the value of `option`.

    Nor is a file written over that is one of `inputs`, or that does not begin with `start` and so is no earlier `kind`.
    """
    if not given:
        raise InputError(f"{option} is empty; give the name of a file")
    path = Path(given)
    try:
        target = path.resolve()
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file")
        if path.exists() and not path.is_file():
            return  # a device or a pipe
        if not target.parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder {target.parent}; make it, or choose another place")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise InputError(f"{option} {path} cannot be written: permission denied; choose another place")
        if target.exists():
            if any(Path(other).exists() and target.samefile(other) for other in inputs):
                raise InputError(f"{option} {path} is a file that this run reads; choose another name")
            with target.open("rb") as file:
                if file.read(len(start)) not in (b"", start):
                    raise InputError(f"{option} {path} is there, and is no {kind}; remove it, or choose another name")
    except (OSError, RuntimeError) as error:  # RuntimeError: Path.resolve, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "a loop of symbolic links"
        raise InputError(f"{option} {str(path)[:80]}: {reason}; choose another place") from error


def write_json(path: Path, values: Mapping[str, Any], option: str = "--report") -> None:
    """Write JSON to `path`, which `option` gave: a regular file whole or not at all, a device or pipe as it is.

    Raises StorageError.
    """
    text = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return
        target = path.resolve()  # a link stays a link
        temporary = target.with_name(f".{os.getpid()}.report.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write the report {path}: {error.strerror}; choose another {option}") from error


@dataclass
class Report:
    """A run, as `--report` writes it.

    `load_s` is from the start of the program to being ready. Where several prompts were answered, `text` to `s_per_token`
    are those of the last; `answers` has these keys for each.
    """

    model: str
    format: str
    backend: str
    allreduce: str
    load_s: float = 0.0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    ttft_s: float | None = None
    s_per_token: float | None = None
    answers: list[Answer] = field(default_factory=list)
    ranks: list[RankFigures] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Note the answer to one more prompt."""
        self.answers.append(answer)
        for key, value in asdict(answer).items():
            setattr(self, key, value)

    def write(self, path: Path) -> None:
        """Write JSON to `path`; see write_json. Raises StorageError."""
        write_json(path, asdict(self))

    def print_table(self) -> None:
        """The table, on stderr."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="none")
        table.add_column("rank host")
        for name in ("heads", "columns", "peak memory", "without weights", "read", "compute", "disk wait", "star"):
            table.add_column(name, justify="right")
        for r in self.ranks:
            table.add_row(
                f"r{r.rank} {r.host}",
                str(r.heads),
                str(r.columns),
                show_size(r.peak_rss_bytes),
                show_size(r.peak_rss_bytes - r.weights_bytes),
                show_size(r.bytes_read),
                *(f"{seconds:.2f} s" for seconds in (r.compute_s, r.read_wait_s, r.star_s)),
            )
        times = [f"load {self.load_s:.2f} s"]
        if self.ttft_s is not None:
            times.append(f"first token {self.ttft_s:.2f} s")
        if self.s_per_token is not None:
            times.append(f"{self.s_per_token:.3g} s/token")
        print(file=sys.stderr)
        Console(file=sys.stderr, width=120, highlight=False, color_system=None).print(table)
        print(
            f"{self.model} {self.format} · {self.backend} · {self.allreduce} · {self.prompt_tokens} prompt tokens, "
            f"{len(self.token_ids)} generated · " + " · ".join(times),
            file=sys.stderr,
        )
        if self.s_per_token is not None:
            used = [(r.host, r.device, r.streamed_bytes_per_token) for r in self.ranks]
            rates = [(*what, what[2] / self.s_per_token) for what in used]
            busy = [(r.read_wait_s, r.read_wait_s + r.compute_s + r.star_s) for r in self.ranks]
            limited = any(waited > _LIMITED_BY_DISK * whole for waited, whole in busy)
            for line in disk_lines(rates, alone=limited):
                print(f"seen: {line}", file=sys.stderr)
        sys.stderr.flush()


def disk_lines(streams: Sequence[tuple[str, int, int, float]], *, alone: bool) -> Iterator[str]:
    """What each disk gives to the ranks that stream from it, in a line; if `alone`, also what it would be with one for each.

    `streams` has for each rank: host, device, bytes for a token, and bytes a second.
    """
    disks: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for host, device, nbytes, rate in streams:
        if nbytes and rate:
            disks.setdefault((host, device), []).append((nbytes, rate))
    for (host, _), here in disks.items():
        whole, rate = sum(nbytes for nbytes, _ in here), sum(rate for _, rate in here)
        line = f"{show_size(whole)} a token from the disk of {host} at {show_size(rate)}/s, {whole / rate:.2g} s/token"
        if len(here) > 1 and alone:
            own = max(nbytes for nbytes, _ in here) / rate
            line += f"; {len(here)} ranks share it: with such a disk for each {own:.2g} s"
        yield line


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident."""
    try:  # getrusage would count the process that started this one, before it became Python
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
