"""OpenAI's package of npm, which the set-up of the tests fetches (`python -m tests.support.node_client`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fetched import fetch_npm, fetch_part
from tests.support.launch import PROGRAMS, TIMEOUT

PACKAGE = "openai@7.59.0"
SHA512 = "wPYKJkLPFEdNJ2tThSg4jE1Ptsv4X3u8g8LIvu0Qz/UIhsKeCzl73rl48PtQsDVrJL/ku0liXOsbyd2TsRsPJw=="
FOLDER = Path(sys.prefix) / "share" / "npm" / "openai"


def ask_by_node(url: str, model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What tests/support/programs/node_client.mjs finds. Skips the test where there is no node, or not the package."""
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed (on Debian: apt-get install nodejs npm)")
    if not FOLDER.is_dir():
        pytest.skip(f"{PACKAGE} of npm was not fetched; set up with: bash jobs/test.sh")
    command = [node, str(PROGRAMS / "node_client.mjs"), str(FOLDER / "index.mjs"), url, model]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    fetch_part(FOLDER, "of npm", lambda folder: fetch_npm(PACKAGE, SHA512, folder, "package/"))
