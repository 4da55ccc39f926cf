"""What tests of doctor hosts share."""

from __future__ import annotations

from tpimpi.diagnostics.doctor.host_findings import (
    HostChecks,
)


def wrong(found: HostChecks) -> list[str]:
    return [f"{check.what}: {check.text}" for check in found.checks if check.state == "wrong"]
