"""The processors of this machine: their name, their caches, and how many of them this process may use."""

from __future__ import annotations

import platform
from pathlib import Path

from tpimpi.system.cgroups import CGROUPS, PROC, cgroup_folders


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system tells it."""
    names = (
        line.partition(":")[2].strip()
        for line in _text(cpuinfo).splitlines()
        if line.startswith(("model name", "Model"))
    )
    return next(names, platform.processor() or platform.machine())


def _flags(cpuinfo: Path) -> list[str]:
    """What the processor can do, as Linux calls it: of x86 "flags", of Arm "Features"."""
    lines = _text(cpuinfo).splitlines()
    return next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])


def amx_extensions(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The matrix extensions of an x86 processor that compute ("amx_bf16", "amx_int8"); none where it has no AMX."""
    return sorted(flag for flag in _flags(cpuinfo) if flag in ("amx_bf16", "amx_fp16", "amx_int8"))


def has_aes(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for AES."""
    return "aes" in _flags(cpuinfo)


def last_level_cache(threads: int, cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last-level caches that so many threads can fill; 32 MiB where the system does not say."""
    sizes: dict[tuple[int, str], int] = {}  # by level and by the cores that share it
    for index in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            sizes[int(level), shared] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return (
        sum(sorted((size for (level, _), size in sizes.items() if level == last), reverse=True)[:threads]) or 32 << 20
    )


def processor_quota(proc: Path = PROC, root: Path = CGROUPS) -> float | None:
    """Processors that the control groups (v1 or v2) of this process allow it in the long run; None where they do not say."""
    found = []
    names = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}
    for folder, version in cgroup_folders("cpu", proc, root):
        values = " ".join(_text(folder / name) for name in names[version]).split()
        if len(values) == 2 and values[0] not in ("max", "-1"):
            found.append(int(values[0]) / int(values[1]))
    return min(found, default=None)
