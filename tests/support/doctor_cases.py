"""What tests of doctor share."""

from __future__ import annotations

from dataclasses import replace

from tpimpi.diagnostics.doctor.rank_facts import Facts, SliceFacts
from tpimpi.star import MpiLibrary
from tpimpi.system.network import (
    Interface,
)

DOCKER0 = Interface("docker0", "inner", ("172.17.0.1/16",))


def facts(host: str, **values: object) -> Facts:
    """A rank with which nothing is wrong."""
    number = sum(map(ord, host)) % 200
    usual = Facts(
        host=host,
        machine=f"machine of {host}",
        tpimpi="1.0",
        python="3.12.1",
        numpy="2.4.0",
        system="Linux",
        byte_order="little",
        mpi=MpiLibrary("Open MPI", "5.0.8", "4.1.0", "Open MPI"),
        kernels="avx2",
        cores=[0, 1, 2, 3],
        host_cores=4,
        memory_total=16_000_000_000,
        memory_free=8_000_000_000,
        memory_headroom=7_000_000_000,
        folder="/cache",
        disk_free=100_000_000_000,
        disk_rate=1e9,
        slice=SliceFacts("here", "/cache/x", missing_bytes=0),
        interfaces=[Interface("eth0", "cable", (f"192.168.1.{number}/24",)), DOCKER0],
    )
    return replace(usual, **values)  # type: ignore[arg-type]
