"""The control groups (v1 and v2) that this process is in, as folders of the kernel's file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def cgroup_folders(controller: str, proc: Path = PROC, root: Path = CGROUPS) -> Iterator[tuple[Path, int]]:
    """Folders of the groups of a controller (memory, cpu), from the process's own up to the root, each with its version, 1
    or 2. Those of version 2 may lack the controller. None where the system does not tell."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top, version = root / controller, 1
        elif controllers == "":
            top, version = root, 2
        else:
            continue
        folder = top / path.lstrip("/")
        while True:
            yield folder, version
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent
