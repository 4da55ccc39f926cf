"""The slices and model files of experiments: made when a row needs them, removed when none that is left does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiment_rows import Row

from tpimpi.errors import InputError, StorageError

SPARE_BYTES = 4e9  # of the disk, left to others


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
            found = json.loads(self._done(row.slices).read_text(encoding="utf-8"))
            return found if "shares" in found else None
        except (OSError, ValueError, TypeError):
            return None

    def _done(self, name: str) -> Path:
        return self.folder / f"{name}.done"

    def make(self, row: Row, shares: str = "", note: Mapping[str, Any] | None = None) -> Path:
        """Have what the row needs there. Raises StorageError where the disk has too little room."""
        path = self.path(row)
        if self.note(row) is not None:
            return path
        self.remove(row.slices)
        self.folder.mkdir(parents=True, exist_ok=True)
        nbytes = row.model_bytes * (1.1 if row.measure != "peer" else 1.15)
        free = shutil.disk_usage(self.folder).free
        if free < nbytes + SPARE_BYTES:
            raise StorageError(
                f"{self.folder} has {free / 1e9:.0f} GB free, {row.slices} takes {nbytes / 1e9:.0f}, and "
                f"{SPARE_BYTES / 1e9:.0f} are left to others; give --work elsewhere"
            )
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
            raise InputError(f"{row.slices} could not be made; see the line above") from error
        self._done(row.slices).write_text(json.dumps({"shares": shares, **(note or {})}), encoding="utf-8")
        return path

    def remove(self, name: str) -> None:
        """Remove these slices, or this model, if they are there."""
        self._done(name).unlink(missing_ok=True)
        for folder in (name, f"{name}.prepared"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def keep(self, names: Collection[str]) -> None:
        """Remove all but these."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                name = path.name.removesuffix(".done").removesuffix(".prepared")
                if name not in names:
                    self.remove(name)
