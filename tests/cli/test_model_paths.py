"""Models at odd places: paths that are no UTF-8, names in a Hugging Face cache, a split file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.cli_cases import PROMPT
from tests.support.launch import Result

SHORT = (*PROMPT, "--max-tokens", "3", "--quiet", "--format", "f32")


def test_a_model_whose_path_is_no_utf8(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / os.fsdecode(b"caf\xe9-1.5")))
    report, session = tmp_path / "report.json", tmp_path / os.fsdecode(b"s\xff")
    plain = tpimpi("--model", str(tiny), *SHORT)
    for _ in range(2):  # the second goes on with the session
        result = tpimpi("--model", str(model), *SHORT, "--report", str(report), "--session", str(session))
        assert result.code == 0, result.err
    assert json.loads(report.read_text("utf-8"))["model"] == model.name
    lines = session.read_text("utf-8").splitlines()
    assert json.loads(lines[0])["model"] == model.name
    assert plain.out.strip() == json.loads(lines[5])["text"].strip()


def test_a_model_of_the_hugging_face_cache_by_name(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some-org--tiny-1.5" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for file in tiny.iterdir():
        (snapshot / file.name).symlink_to(file)
    report = tmp_path / "report.json"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    result = tpimpi("--model", "some-org/tiny-1.5", *SHORT, "--report", str(report), env=env)
    assert result.code == 0, result.err
    assert json.loads(report.read_text())["model"] == "tiny-1.5"
    assert result.out == tpimpi("--model", str(tiny), *SHORT).out
