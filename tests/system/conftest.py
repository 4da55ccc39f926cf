"""What the tests of this room share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.support.direct_io_cases import CONTENT
from tests.support.memory_cases import GB, HOST
from tpimpi.system.direct_io import (
    Descriptor,
)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 32 GB, 20 of them free, and no batch job, whatever the tests run on."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=HOST, available=20 * GB))
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "file"
    path.write_bytes(CONTENT.tobytes())
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    """The same file on tmpfs, which older kernels do not read with O_DIRECT."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="tpimpi-test-"))
    try:
        path = folder / "file"
        path.write_bytes(CONTENT.tobytes())
        yield path
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["direct", "plain", "tmpfs"])
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Descriptor]:
    """A descriptor of the file, past the page cache, through it because the system has no O_DIRECT, and on tmpfs."""
    if request.param == "plain":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    opened = Descriptor(request.getfixturevalue("in_memory" if request.param == "tmpfs" else "on_disk"))
    if request.param == "direct" and not opened.direct:
        opened.close()
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    assert not (request.param == "plain" and opened.direct)
    yield opened
    opened.close()
