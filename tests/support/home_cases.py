"""What tests of home share."""

from __future__ import annotations

from pathlib import Path


def left_of(name: str) -> list[str]:
    """What the machine still has of the home with that id."""
    left = [str(folder) for folder in Path("/var/tmp").glob(f"*{name}*")]
    left += [str(folder) for folder in Path("/sys/fs/cgroup").glob(f"**/tpimpi-home-{name}*")]
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"TPIMPI_EMULATED_HOME={name}".encode() in (place / "environ").read_bytes():
                left.append(f"process {place.name}: {(place / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if name in file.read_text():
                left.append(str(file))
        except OSError:
            continue
    return left
