"""Options of `serve` that cannot be used: one line, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result
from tests.support.messages import assert_one_line
from tpimpi.cli.serve_options import listening, parse_serve
from tpimpi.errors import InputError
from tpimpi.serving.server import front_process

WRONG = {
    "no keys": (
        ["--host", "0.0.0.0"],
        "--host is 0.0.0.0, where other machines can ask, and there is no --api-key-file",
    ),
    "half of TLS": (["--tls-cert", "cert.pem"], "--tls-cert is given alone"),
    "no such keys": (["--api-key-file", "/nowhere/keys"], "--api-key-file /nowhere/keys: No such file"),
    "no such certificate": (["--tls-cert", "/nowhere/c", "--tls-key", "/nowhere/k"], "--tls-cert /nowhere/c"),
    "an address of nobody": (["--host", "192.0.2.1", "--insecure"], "cannot listen on 192.0.2.1 port 8080"),
    "a port": (["--port", "70000"], "--port is 70000, must be 0 to 65535"),
    "a prompt": (["--prompt", "hello"], "unrecognized arguments: --prompt"),
    "a draft that is off": (["--draft", "x", "--speculate", "off"], "--draft is given and --speculate is off"),
    "a long context": (["--port", "0", "--context", "9999999"], "--context is 9999999, this model has 8192 positions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_said_in_a_line(tpimpi: Callable[..., Result], smollm2: object, name: str) -> None:
    options, line = WRONG[name]
    result = tpimpi("serve", "--quiet", "--model", str(smollm2), *options)
    lines = [one for one in result.err.splitlines() if not one.startswith("tpimpi: http://")]
    assert_one_line(Result(result.code, result.out, "\n".join(lines)), line)


def test_keys_that_others_can_read_are_remarked(tmp_path: Path) -> None:
    file = tmp_path / "my keys"
    file.write_text("sk-anna-123456\n")
    options = parse_serve(["--api-key-file", str(file)])
    file.chmod(0o640)
    said = list(listening("http://x", options))[1:]
    assert said == [f"--api-key-file {file} can be read by others; type: chmod 600 '{file}'"]
    file.chmod(0o600)
    assert len(list(listening("http://x", options))) == 1


def test_a_missing_package_is_said_with_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_process, "PACKAGES", ("msgspec", "no_such_package"))
    with pytest.raises(InputError, match=r"no_such_package.*pip install 'tpimpi\[serve\]'"):
        front_process.check_installed()
