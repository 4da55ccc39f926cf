"""API keys: whose they are, and files that cannot be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tpimpi.errors import InputError
from tpimpi.serving.server.keys import Keys, given_key


def test_a_key_has_an_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\n\nanna=sk-anna-123456\nsk-nobody-123456\nlong = sk=with==\nbase64/9x==\n")
    keys = Keys(str(file))
    assert keys.owner("sk-anna-123456") == "anna"
    assert keys.owner("sk-nobody-123456") == f"key {hashlib.sha256(b'sk-nobody-123456').hexdigest()[:16]}"
    assert keys.owner("sk=with==") == "long" and keys.owner("base64/9x==") not in (None, keys.owner("sk-nobody-123456"))
    assert keys.owner("anna=sk-anna-123456") is None and keys.owner("") is None and keys.owner("\udcff") is None


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"short\n", b"name=\n", b"name=short\n", b"\xff\xfe\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(InputError, match="--api-key-file"):
        Keys(str(tmp_path / "keys"))
    with pytest.raises(InputError, match=r"--api-key-file .*missing: No such file"):
        Keys(str(tmp_path / "missing"))


def test_a_file_without_end_is_not_read_into_memory() -> None:
    with pytest.raises(InputError, match=r"--api-key-file /dev/zero has over \d+ bytes"):
        Keys("/dev/zero")


def test_a_key_comes_in_one_of_two_headers() -> None:
    assert given_key({"authorization": "Bearer abc"}) == given_key({"authorization": "bearer  abc "}) == "abc"
    assert given_key({"x-api-key": "abc"}) == "abc"
    assert given_key({"authorization": "Basic abc"}) is None and given_key({}) is None
