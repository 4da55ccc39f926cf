"""Runs on another host, sent there over ssh by `doctor --hostfile`: with whatever Python 3.8 or newer stands at the path of
ours, and without tpimpi, if it must be. It says in lines of JSON, each behind the word `tpimpi-probe`, what it finds.

Arguments: a token, an address here:port or "" (of the host that asks, where it listens), a name (of that host), and how many
seconds to wait for each connection.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import time
from typing import Any


def emit(**values: Any) -> None:
    """Write a line for the host that asks."""
    print("tpimpi-probe " + json.dumps(values), flush=True)


def text(path: str) -> str:
    """What a file holds, without the space around it; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return ""


def open_swaps() -> list[str]:
    """Where memory may be written to a disk as it is: not to compressed memory (zram), nor to a device of dm-crypt."""
    found = []
    for line in text("/proc/swaps").splitlines()[1:]:
        name = line.split()[0]
        device = os.path.basename(os.path.realpath(name))  # noqa: PTH119
        if not device.startswith("zram") and not text(f"/sys/block/{device}/dm/uuid").startswith("CRYPT-"):
            found.append(name)
    return found


def problem(error: BaseException) -> str:
    """An error in one short line."""
    return type(error).__name__ + ": " + " ".join(str(error).split())[:300]


def keys() -> dict[str, Any]:
    """What is told of this host's keys for sealed links, of which nothing is secret."""
    try:
        import msgspec

        from tpimpi.system.link_keys import find_keys

        return {"keys": msgspec.to_builtins(find_keys())}
    except Exception as error:
        return {"keys_error": problem(error)}


def facts() -> dict[str, Any]:
    """What is installed, in which version; an `…_error` says why something could not be imported."""
    found: dict[str, Any] = {
        "host": platform.node(),
        "machine": text("/proc/sys/kernel/random/boot_id"),
        "python": platform.python_version(),
        "arch": platform.machine(),
        "byte_order": sys.byteorder,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ssh": os.environ.get("SSH_CONNECTION", ""),
        "swaps": open_swaps(),
    }
    try:
        import tpimpi

        found["tpimpi"], found["folder"] = tpimpi.__version__, os.path.dirname(tpimpi.__file__)  # noqa: PTH120
    except Exception as error:
        found["tpimpi_error"] = problem(error)
    try:
        import mpi4py

        found["mpi4py"] = mpi4py.__version__
        mpi4py.rc.initialize = False
        from mpi4py import MPI

        found["mpi"], version = MPI.get_vendor()
        found["mpi_version"] = ".".join(map(str, version))
    except Exception as error:
        found["mpi_error"] = problem(error)
    try:
        from tpimpi.weights.locations import cache_folder

        place = str(cache_folder())
        found["cache"] = place
        while not os.path.exists(place):  # noqa: PTH110
            place = os.path.dirname(place)  # noqa: PTH120
        found["free"] = shutil.disk_usage(place).free
    except Exception as error:
        found["cache_error"] = problem(error)
    found.update(keys())
    try:
        import psutil

        up = {  # as MPI libraries see it; `isup` leaves out a bridge that nothing is plugged into
            name: "up" in getattr(one, "flags", "").split(",") or one.isup
            for name, one in psutil.net_if_stats().items()
        }
        found["interfaces"] = [
            [name, a.address, a.netmask]
            for name, addresses in psutil.net_if_addrs().items()
            for a in addresses
            if a.family == socket.AF_INET and up[name]
        ]
    except Exception as error:
        found["interfaces_error"] = problem(error)
    return found


def call(address: str, token: str, seconds: float) -> str:
    """Whether a connection to `host:port` gives the token: "" if so, else what is wrong."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds) as line:
            line.settimeout(seconds)
            line.sendall(token.encode())
            return "" if line.recv(64) == token.encode() else "something else answers there"
    except OSError as error:
        return problem(error)


def resolve(name: str) -> list[str]:
    """The addresses (IPv4) that a name has here; none where it is unknown."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:
        return []


def listen(token: str, seconds: float) -> bool:
    """Say on which port we listen, and whether somebody came with the token."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(4)
        emit(listening=listener.getsockname()[1])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            listener.settimeout(max(0.05, end - time.monotonic()))
            try:
                line, _ = listener.accept()
                with line:
                    line.settimeout(1)
                    if line.recv(64) == token.encode():
                        line.sendall(token.encode())
                        return True
            except OSError:
                pass
        return False


def main() -> None:
    token, address, name, seconds = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
    emit(facts=facts())
    if address:
        emit(resolved=resolve(name))
        emit(back=call(address, token, seconds))
        emit(came=listen(token, seconds))
    emit(done=True)


if __name__ == "__main__":
    main()
