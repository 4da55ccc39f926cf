"""The slices and models of bench/experiments, what it removes, and rows that fail."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import limits
from bench.experiments import command as experiments
from bench.experiments import models as models_of
from bench.experiments import results as results_of
from bench.experiments import rows as rows_of
from bench.experiments import site as site_of

# EXP ['experiments', 'results_of', 'rows_of', 'site_of']
from tpimpi.errors import InputError, StorageError, TpimpiError


def seven(**settings: Any) -> Any:
    """A row of 7B in q4_0 on one device, with these settings."""
    (row,) = rows_of.choose(rows_of.read_rows(), ["devices"], "shape=llama-2-7b format=q4_0 devices=1")
    return replace(row, **settings)


def small(**settings: Any) -> Any:
    """A row whose model is made in a moment."""
    return seven(shape="tinyllama-1.1b", layers=1, memory="", read="", shares="", **settings)


def test_only_what_was_made_here_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = site_of.Site(tmp_path).models
    row = small()
    stranger = models.folder / "photos" / "one.png"
    stranger.parent.mkdir(parents=True)
    for path in (stranger, models.folder / "notes.txt", models.folder / "x.done"):
        path.write_text("mine")

    def interrupted(command: list[str], **options: Any) -> None:
        (models.path(row) / "part").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(models_of.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.make(row)
    assert (models.path(row) / "part").exists() and models.note(row) is None
    models.keep({row.slices})
    assert (models.path(row) / "part").exists()
    models.keep(())
    assert {path.name for path in models.folder.iterdir()} == {"photos", "notes.txt", "x.done"}
    assert stranger.read_text() == "mine"


def test_a_folder_of_somebody_else_is_not_made_anew(tmp_path: Path) -> None:
    models = site_of.Site(tmp_path).models
    row = small()
    models.path(row).mkdir(parents=True)
    with pytest.raises(StorageError, match="is there, and was not made by experiments; remove it, or give --work"):
        models.make(row)
    models.keep(())
    assert models.path(row).exists()


@pytest.mark.parametrize(
    ("measure", "program", "format", "times"),
    [("generate", "tpimpi", "q4_0", 1.1), ("peer", "accelerate", "bf16", 1.15), ("peer", "airllm", "bf16", 2.15)],
)
def test_the_disk_must_have_room_for_copies_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str, program: str, format: str, times: float
) -> None:
    row = seven(measure=measure, program=program, format=format)
    weights = {"q4_0": 3.782e9, "bf16": 13.214e9}[format]
    for spare, fits in ((1.01, True), (0.99, False)):
        free = shutil._ntuple_diskusage(1 << 50, 0, int(weights * times * spare + 4e9))  # type: ignore[attr-defined]
        monkeypatch.setattr(models_of.shutil, "disk_usage", lambda path, free=free: free)
        monkeypatch.setattr(models_of.subprocess, "run", lambda *words, **options: None)
        models = models_of.Models(tmp_path / str(spare))
        if fits:
            assert models.make(row) == models.path(row)
        else:
            with pytest.raises(StorageError, match=f"takes {weights * times / 1e9:.0f}, and 4 are left to others"):
                models.make(row)


# A row that fails


@pytest.mark.parametrize("kind", ["InputError", "LimitError", "ModelsError"])
def test_a_row_that_fails_is_one_line_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows = rows_of.read_rows()[-2:]
    errors = {"InputError": InputError, "LimitError": limits.LimitError, "ModelsError": models_of.ModelsError}
    assert all(issubclass(error, TpimpiError) for error in errors.values())

    def measure(row: Any, site: Any) -> tuple[dict[str, Any], float]:
        if row == rows[0]:
            raise errors[kind]("no such thing")
        return {"s_per_token": 1.0}, 2.0

    monkeypatch.setattr(experiments, "measure", measure)
    results = results_of.Results(tmp_path / "results.jsonl")
    options = experiments.parse(["run", "--work", str(tmp_path)])
    assert experiments.run(options, rows, results) == 1
    assert [line["settings"] for line in results.lines] == [rows[1].settings()]
    said = capsys.readouterr().err
    assert "  failed: no such thing; once more\n" in said and "1 of 2 rows failed" in said


def test_slices_that_synth_cannot_make_fail_the_row(tmp_path: Path) -> None:
    models = models_of.Models(tmp_path / "models")
    with pytest.raises(models_of.ModelsError, match="could not be made; see the line above") as caught:
        models.make(small(devices=2), "1,2,3")
    assert caught.value.exit_code == 1
    models.keep(())
    assert not list(models.folder.iterdir())


def test_the_disk_that_is_limited_is_that_of_the_work_folder(tmp_path: Path) -> None:
    row = replace(small(devices=2), read="200MB/s")
    assert [device.cache for device in site_of.devices_of(row, tmp_path)] == [tmp_path / "laptop", tmp_path / "desktop"]
    assert {device.cache for device in site_of.devices_of(replace(row, read=""), tmp_path)} == {None}
