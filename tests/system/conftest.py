"""What the tests of this room share."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from tests.support.memory_cases import GB, HOST


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 32 GB, 20 of them free, and no batch job, whatever the tests run on."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=HOST, available=20 * GB))
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
