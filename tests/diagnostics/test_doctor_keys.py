"""doctor --make-keys: keys for all hosts of a hostfile or for none, over ssh, and what doctor says of those that are there.

Hosts are folders here, in which a program in the place of ssh has the file of keys of each. Before and after what it runs
it notes arguments and environment of every process of this machine.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.support.launch import Result
from tests.support.messages import assert_one_line
from tpimpi.diagnostics.doctor.host_findings import HostChecks
from tpimpi.diagnostics.doctor.hosts import print_report
from tpimpi.diagnostics.doctor.keys import check_keys
from tpimpi.diagnostics.doctor.ssh import local_facts
from tpimpi.errors import InputError, StorageError
from tpimpi.system.hostfile import Host
from tpimpi.system.link_keys import encode_keys, find_keys, make_keys, put_keys, read_keys, write_keys

HOSTS = ("localhost", "me@one.invalid", "two.invalid")
DAY = "2026-02-03"


class Home:
    """The hosts' files, and how doctor is run for them."""

    def __init__(self, folder: Path, program: Callable[..., str], tpimpi: Callable[..., Result]) -> None:
        self.folder, self.seen, self._tpimpi = folder, folder / "seen", tpimpi
        self.hostfile, self.json = folder / "home.txt", folder / "found.json"
        self.hostfile.write_text("\n".join(HOSTS) + "\n")
        look = f"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ >> {self.seen} 2>/dev/null"
        self.ssh = program(
            f"umask 0; host=$1; shift; {look}\n"
            f"case $host in off*) exit 255;; shared*) host=two.invalid;; esac\n"
            f'export TPIMPI_LINK_KEYS={folder}/$host/deep/keys; echo Welcome; sh -c "$*"; {look}'
        )

    def file(self, host: str) -> Path:
        return self.folder / host / "deep" / "keys"

    def files(self) -> list[bytes | None]:
        return [path.read_bytes() if (path := self.file(host)).exists() else None for host in HOSTS]

    def doctor(self, *options: str) -> tuple[Result, dict[str, list[str]]]:
        """What doctor says of each host's keys."""
        self.json.unlink(missing_ok=True)
        arguments = ("--hostfile", str(self.hostfile), "--ssh", self.ssh, "--json", str(self.json))
        env = {"TPIMPI_LINK_KEYS": str(self.file("localhost"))}
        result = self._tpimpi("doctor", *arguments, *options, env=env)
        found = json.loads(self.json.read_text())["hosts"] if self.json.exists() else []
        return result, {
            host["name"]: [f"{c['state']} {c['text']}" for c in host["checks"] if c["what"] == "keys"] for host in found
        }


@pytest.fixture
def home(tmp_path: Path, program: Callable[..., str], tpimpi: Callable[..., Result]) -> Home:
    return Home(tmp_path, program, tpimpi)


@pytest.fixture
def watched(tmp_path: Path):
    """Collects arguments and environment of all processes, again and again; call it for what was seen."""
    seen: set[bytes] = set()
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.02):
            for entry in Path("/proc").iterdir():
                if entry.name.isdecimal():
                    for name in ("cmdline", "environ"):
                        try:
                            seen.add((entry / name).read_bytes())
                        except OSError:
                            continue

    thread = threading.Thread(target=look)
    thread.start()

    def stop() -> bytes:
        end.set()
        thread.join()
        return b"\n".join(seen)

    yield stop
    stop()


def test_each_host_gets_its_file_and_nothing_else_sees_a_key(home: Home, watched: Callable[[], bytes]) -> None:
    result, words = home.doctor("--make-keys")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert words == {host: [f"ok of {today}, in {home.file(host)}"] for host in HOSTS}, result.out + result.err
    files = {host: read_keys(home.file(host)) for host in HOSTS}
    private = [file.private_key() for file in files.values() if file is not None]
    assert len(set(private)) == len(HOSTS)
    public = [X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw() for key in private]
    for host, file in files.items():
        assert file is not None and file.host == host and file.made == today
        assert [file.public_key(other) for other in HOSTS] == public
        assert home.file(host).stat().st_mode & 0o777 == 0o600
        assert home.file(host).parent.stat().st_mode & 0o077 == 0
    everything = watched() + home.seen.read_bytes() + result.out.encode() + result.err.encode()
    everything += home.json.read_bytes()
    assert b"tpimpi.system.link_keys\0" in everything.replace(b" new\0", b"\0"), "what took the keys was not seen"
    for key in private:
        assert key not in everything and key.hex().encode() not in everything
    left = [path for path in home.folder.rglob("*") if path.is_file() and path not in map(home.file, HOSTS)]
    assert not [path for path in left for key in private if key.hex().encode() in path.read_bytes()]

    # They are not replaced unless that is wanted.
    before = home.files()
    result, _ = home.doctor("--make-keys")
    assert_one_line(result, "there are keys already on localhost, me@one.invalid, two.invalid, .* --rotate-keys")
    assert home.files() == before
    home.doctor("--make-keys", "--rotate-keys")
    after = home.files()
    assert None not in after and not set(after) & set(before)
    homes = [read_keys(home.file(host)) for host in HOSTS]
    assert len({json.dumps(one.public) for one in homes if one is not None}) == 1


def test_where_a_host_does_not_answer_no_host_gets_keys(home: Home) -> None:
    home.hostfile.write_text("\n".join(["localhost", "two.invalid", "off.invalid"]))
    result, words = home.doctor("--make-keys")
    assert result.code == 1
    assert words["off.invalid"][0].startswith("wrong no keys were made, for no host, because of this one")
    assert home.files() == [None] * 3
    assert (
        words["localhost"]
        == words["two.invalid"]
        == [
            "wrong none, which a run over several hosts needs; type: python -m tpimpi doctor --hostfile FILE --make-keys"
        ]
    )


def test_a_host_that_cannot_write_them(home: Home) -> None:
    """Which has them then, and what to do, is said."""
    home.file("two.invalid").parent.parent.write_text("in the way")
    earlier = make_keys(["localhost"], DAY)["localhost"]
    write_keys(earlier, home.file("localhost"))
    result, words = home.doctor("--make-keys", "--rotate-keys")
    assert result.code == 1
    assert words["two.invalid"][0].startswith("wrong not written: the folder ")
    assert (
        "the new ones are on me@one.invalid alone; mend that, and type again, with --make-keys --rotate-keys"
        in (words["two.invalid"][0])
    )
    assert words["me@one.invalid"] == ["note new ones, without two.invalid, where they could not be written"]
    assert words["localhost"] == ["note as before, since they could not be written on two.invalid"]
    assert read_keys(home.file("localhost")) == earlier and home.file("me@one.invalid").exists()


def test_hosts_that_share_a_folder_share_a_file(home: Home) -> None:
    home.hostfile.write_text("localhost\ntwo.invalid\nshared.invalid\n")
    _, words = home.doctor("--make-keys")
    assert not [text for texts in words.values() for text in texts if text.startswith("wrong")]
    assert words["shared.invalid"][0].endswith("those of the host two.invalid")
    file = read_keys(home.file("two.invalid"))
    assert file is not None and file.host == "two.invalid"


def test_keys_of_this_user_alone(tpimpi: Callable[..., Result], tmp_path: Path) -> None:
    env = {"TPIMPI_LINK_KEYS": str(tmp_path / "a" / "keys")}
    result = tpimpi("doctor", "--make-keys", env=env)
    assert result.code == 0, result.err
    found = find_keys(tmp_path / "a" / "keys")
    assert (found.problem, found.host) == ("", os.uname().nodename)
    again = tpimpi("doctor", "--make-keys", env=env)
    assert_one_line(again, "is there already, and is of .* --make-keys --rotate-keys")
    assert tpimpi("doctor", "--make-keys", "--rotate-keys", env=env).code == 0
    assert find_keys(tmp_path / "a" / "keys").table != found.table


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (("--rotate-keys",), "--make-keys may replace keys, which is not given"),
        (("--make-keys", "--json", "x"), "leave out --json"),
    ],
)
def test_options_without_a_meaning(tpimpi: Callable[..., Result], options: tuple[str, ...], piece: str) -> None:
    result = tpimpi("doctor", *options)
    assert_one_line(result, piece)


# What doctor says of keys that are there


def host(name: str, path: Path, *, here: bool = False) -> HostChecks:
    return HostChecks(Host(name, name), here=here, facts={"keys": msgspec.to_builtins(find_keys(path))})


def said(*hosts: HostChecks) -> list[list[str]]:
    check_keys(hosts, datetime.date(2027, 2, 3))
    return [[f"{check.state} {check.text}" for check in one.checks] for one in hosts]


def test_what_is_said_of_keys(tmp_path: Path) -> None:
    ours, other = make_keys(["a", "b", "c"], DAY), make_keys(["a", "b"], "2027-01-01")
    for name in ours:
        write_keys(ours[name], tmp_path / name)
    a, b, c = (host(name, tmp_path / name, here=name == "a") for name in ours)
    assert said(a, b, c) == [[f"ok of {DAY}, in {tmp_path / name}"] for name in ours]
    write_keys(other["b"], tmp_path / "b")
    (tmp_path / "c").chmod(0o640)
    b, c, d = (host(name, tmp_path / name) for name in ("b", "c", "d"))
    assert said(a, b, c, d)[1:] == [
        [
            "wrong of 2027-01-01, and of another home than those of a, so that they cannot meet; type: python -m tpimpi "
            "doctor --hostfile FILE --make-keys --rotate-keys"
        ],
        [
            f"wrong the file of link keys {tmp_path / 'c'} has mode 640 and owner {os.geteuid()}: others can read or "
            "change it; make new keys (python -m tpimpi doctor --hostfile FILE --make-keys --rotate-keys), or, if you know "
            "that nobody did: chmod 600"
        ],
        ["wrong none, which a run over several hosts needs; type: python -m tpimpi doctor --hostfile FILE --make-keys"],
    ]
    old = make_keys(["a", "b"], "2026-02-02")
    for name in old:
        write_keys(old[name], tmp_path / name)
    assert said(host("a", tmp_path / "a", here=True), host("b", tmp_path / "b"))[0][0].startswith(
        "note of 2026-02-02, 366 days old; for new ones type: "
    )
    assert said(host("a", tmp_path / "nowhere")) == [[]], "one host needs none"


@pytest.mark.parametrize("made", ["last week", "", "9" * 5000], ids=len)
def test_a_host_that_says_no_day_is_one_that_is_wrong(tmp_path: Path, made: str) -> None:
    """It may be in strange hands, and its own program another one."""
    ours = make_keys(["a", "b"], DAY)
    for name in ours:
        write_keys(ours[name], tmp_path / name)
    a, b = (host(name, tmp_path / name, here=name == "a") for name in ours)
    b.facts["keys"]["made"] = made
    (good,), (bad,) = said(a, b)
    assert good.startswith("ok")
    assert bad.startswith("wrong made on no day: ") and len(bad) < 200


def test_a_terminal_obeys_nothing_that_a_host_says(capsys: pytest.CaptureFixture[str]) -> None:
    one = HostChecks(Host("a", "a"), here=False, facts={})
    one.add("keys", "wrong", "in \x1b[2J\x9b2J/home\nok  all is well")
    print_report("home.txt", local_facts(), [one])
    out = capsys.readouterr().out
    assert "in \\x1b[2J\\x9b2J/home ok all is well\n" in out
    assert not [c for c in out if c != "\n" and not c.isprintable()]


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys", 0o600)
    found: list[str] = []
    looking = threading.Thread(target=lambda: found.append(find_keys(tmp_path / "keys").problem), daemon=True)
    looking.start()
    looking.join(10)
    assert found and "is no file; remove it" in found[0]


def test_a_file_that_cannot_be_used_is_found(tmp_path: Path) -> None:
    path, keys = tmp_path / "keys", make_keys(["a", "b"], DAY)
    text = encode_keys(keys["a"]).decode()
    for broken, piece in (
        (text.replace(keys["a"].private, keys["b"].private), "the private key is not that of the host 'a'"),
        (text.replace(DAY, "last week"), "made is 'last week'"),
        (text[:100], "is no file of link keys"),
    ):
        path.write_text(broken)
        path.chmod(0o600)
        found = find_keys(path)
        assert piece in found.problem and found.there and keys["a"].private not in found.problem
        assert found.problem.endswith("--make-keys --rotate-keys"), "what replaces a file that is there"


def test_keys_are_written_over_nothing_else(tmp_path: Path) -> None:
    keys = make_keys(["a"], DAY)["a"]
    letter, damaged = tmp_path / "letter", tmp_path / "damaged"
    letter.write_text("Dear Anna")
    os.mkfifo(tmp_path / "pipe")
    for path in (letter, tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(InputError, match="is no file of link keys, so none are written over it; remove it, or set"):
            write_keys(keys, path)
    assert letter.read_text() == "Dear Anna"
    damaged.write_bytes(encode_keys(keys)[:100])
    assert find_keys(write_keys(keys, damaged)).problem == ""
    (tmp_path / "loop").symlink_to("loop")
    with contextlib.suppress(StorageError):  # "Too many levels of symbolic links", or written in its place
        write_keys(keys, tmp_path / "loop")


# The other end of ssh


def test_a_file_that_came_in_part_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    monkeypatch.setenv("TPIMPI_LINK_KEYS", str(path))
    new, later = (encode_keys(make_keys(["a"], DAY)["a"]) for _ in range(2))
    for cut in (0, 1, len(new) // 2, len(new) - 3):
        with pytest.raises(InputError, match="what came over ssh is no file of link keys"):
            put_keys(new[:cut], replace=True)
    assert not path.exists()
    before = os.umask(0)
    try:
        put_keys(new, replace=False)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_bytes() == new
    with pytest.raises(InputError, match="is there already"):
        put_keys(later, replace=False)
    assert path.read_bytes() == new
    put_keys(later, replace=True)
    assert path.read_bytes() == later
    monkeypatch.setenv("TPIMPI_LINK_KEYS", str(path / "inside"))
    with pytest.raises((StorageError, InputError)):
        put_keys(new, replace=True)
