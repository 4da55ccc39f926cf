"""What the tests of this room share."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result
from tpimpi.system.link_keys import make_keys, write_keys


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """Writes a shell script and returns its path."""

    def write(text: str, name: str = "agent") -> str:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def doctor(tpimpi: Callable[..., Result], tmp_path: Path) -> Callable[..., tuple[Result, dict[str, list[str]]]]:
    """Runs doctor with a hostfile of those lines: its result, and the checks of each host in words. All hosts share a file
    of keys."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    keys = write_keys(make_keys(["localhost"], today)["localhost"], tmp_path / "keys")

    def run(lines: list[str], *options: str, **more: object) -> tuple[Result, dict[str, list[str]]]:
        (tmp_path / "home.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / "found.json").unlink(missing_ok=True)
        arguments = ("--hostfile", str(tmp_path / "home.txt"), "--json", str(tmp_path / "found.json"))
        result = tpimpi("doctor", *arguments, *options, **{"env": {"TPIMPI_LINK_KEYS": str(keys)}, **more})
        found = json.loads((tmp_path / "found.json").read_text())
        assert result.code == (1 if found["wrong"] else 0)
        words = {
            host["name"]: [f"{check['state']} {check['what']}: {check['text']}" for check in host["checks"]]
            for host in found["hosts"]
        }
        return result, words

    return run
