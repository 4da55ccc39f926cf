"""The slices and model files of experiments: made when a row needs them, removed when none that is left does.

Beside what is made stands a mark, put there before the making: NAME.tpimpi-making, then NAME.tpimpi-done. Only what has one
is removed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bench.experiments.rows import Row
from bench.peers.peers import PEERS
from tpimpi.errors import StorageError, TpimpiError

FOLDER = "tpimpi-models"  # in the work folder
SPARE_BYTES = 4e9  # of the disk, left to others
_MORE = {
    "slices": 1.1,
    "peer": 1.15,
    "copy": 1.0,
}  # bytes on disk for each of the weights: with the embedding, and tables
_MAKING, _DONE = ".tpimpi-making", ".tpimpi-done"


class ModelsError(TpimpiError):
    """Slices or a model could not be made."""


class Models:
    """What synth makes, in a folder, under the names of Row.slices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, row: Row) -> Path:
        """Where the row's slices, folder or file are."""
        return self.folder / row.slices

    def prepared(self, row: Row) -> Path:
        """A folder for what a program makes of the model once."""
        return self.folder / f"{row.slices}.prepared"

    def note(self, row: Row) -> dict[str, Any] | None:
        """What make was told of what it made; None where that is not there."""
        try:
            found = json.loads(self._mark(row.slices, _DONE).read_text(encoding="utf-8"))
            return found if "shares" in found else None
        except (OSError, ValueError, TypeError):
            return None

    def nbytes(self) -> int:
        """What is there takes so many bytes of the disk."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return sum(path.stat().st_size for path in files)

    def _mark(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}{kind}"

    def _marked(self) -> set[str]:
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        return {path.stem for path in paths if path.suffix in (_MAKING, _DONE) and path.is_file()}

    def make(self, row: Row, shares: str = "", note: Mapping[str, Any] | None = None) -> Path:
        """Have what the row needs there. Raises StorageError where the disk has too little room, and ModelsError."""
        path = self.path(row)
        there = self.note(row) is not None
        if not there:
            self._clear(row)
        self._check_room(row, there)
        if there:
            return path
        command = [sys.executable, "-m", "tpimpi", "synth", "--shape", row.shape, "--out", str(path)]
        if row.layers:
            command += ["--layers", str(row.layers)]
        if row.measure != "peer":
            command += ["--ranks", str(row.devices), "--format", row.format]
            command += ["--shares", shares] if shares else []
        elif ".gguf." in row.slices:
            command[-1] = str(path / "model.gguf")
            path.mkdir()
            command += ["--as", "gguf", "--format", row.format]
        else:
            command += ["--as", "hf"]
        try:
            subprocess.run([*command, "--quiet"], check=True, stdin=subprocess.DEVNULL)
        except subprocess.CalledProcessError as error:
            raise ModelsError(f"{row.slices} could not be made; see the line above") from error
        self._mark(row.slices, _MAKING).write_text(json.dumps({"shares": shares, **(note or {})}), encoding="utf-8")
        self._mark(row.slices, _MAKING).replace(self._mark(row.slices, _DONE))
        return path

    def _clear(self, row: Row) -> None:
        """A marked place, with nothing there yet."""
        name, path = row.slices, self.path(row)
        if name in self._marked():
            self.remove(name)
        if path.exists():
            raise StorageError(f"{path} is there, and was not made by experiments; remove it, or give --work elsewhere")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark(name, _MAKING).touch()

    def _check_room(self, row: Row, there: bool) -> None:
        """Raise StorageError where what is still to be made would leave the disk too little room."""
        peer = PEERS.get(row.program) if row.measure == "peer" else None
        parts = [] if there else ["slices" if peer is None else "peer"]
        if peer is not None and peer.prepares and not self.prepared(row).exists():
            parts.append("copy")
        nbytes = row.model_bytes * sum(_MORE[part] for part in parts)
        free = shutil.disk_usage(self.folder).free
        if parts and free < nbytes + SPARE_BYTES:
            raise StorageError(
                f"{self.folder} has {free / 1e9:.0f} GB free, {row.slices} takes {nbytes / 1e9:.0f}, and "
                f"{SPARE_BYTES / 1e9:.0f} are left to others; give --work elsewhere"
            )

    def remove(self, name: str) -> None:
        """Remove these slices, or this model, which is marked. Broken off, it leaves them marked as not whole."""
        with contextlib.suppress(FileNotFoundError):
            self._mark(name, _DONE).replace(self._mark(name, _MAKING))
        folders = [self.folder / name, self.folder / f"{name}.prepared"]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not any(folder.exists() for folder in folders):
            self._mark(name, _MAKING).unlink(missing_ok=True)

    def keep(self, names: Collection[str]) -> None:
        """Remove all that was made but these."""
        for name in sorted(self._marked() - {*names}):
            self.remove(name)
