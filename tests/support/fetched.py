"""What the set-up of the tests fetches beside Python packages: each part is complete or absent."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path


def fetch_part(part: Path, what: str, fetch_into: Callable[[Path], None]) -> None:
    """The folder `part`, which `fetch_into` fills, where it is not there; a line where it cannot be fetched."""
    if part.is_dir():
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        made = Path(folder) / part.name
        made.mkdir()
        try:
            fetch_into(made)
        except (OSError, subprocess.SubprocessError, ValueError, tarfile.TarError) as error:
            print(f"setup: no {part.name} {what}: {error}; tests that need them are skipped", file=sys.stderr)
            return
        made.rename(part)


def fetch_npm(package: str, sha512: str, folder: Path, prefix: str) -> None:
    """The files below `prefix` of a package (`name@version`) of npm into the folder. Raises ValueError where it is another
    package, or there is no npm."""
    if (npm := shutil.which("npm")) is None:
        raise ValueError("npm is not installed (on Debian: apt-get install npm)")
    with tempfile.TemporaryDirectory() as archives:
        run([npm, "pack", "--silent", "--pack-destination", archives, package])
        archive = next(Path(archives).iterdir())
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != sha512:
            raise ValueError(f"{package} has the SHA-512 {digest}, must have {sha512}")
        unpack(archive, folder, prefix)


def unpack(archive: Path, folder: Path, prefix: str) -> None:
    """The files of the archive below `prefix`, without it."""
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and member.name.startswith(prefix):
                target = folder / member.name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = files.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())


def run(command: list[str]) -> None:
    """Raises ValueError with the last line that the command said, where it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise ValueError(f"{' '.join(command[:4])}: {lines[-1][:200]}")
