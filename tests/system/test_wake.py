"""Wake-on-LAN: the packets that `up --wake` sends, as they come to network cards of another host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import TIMEOUT
from tests.support.pairs import Pair
from tpimpi.errors import InputError, StarError
from tpimpi.system import wake as wake_module
from tpimpi.system.wake import macs_of, wake

ALL = "ffffffffffff"
ETHERTYPE_IPV4 = "0800"
# Prints all frames that come to the named interfaces, whatever they are, until its standard input ends.
CARDS = """
import select, socket, sys
cards = {}
for name in sys.argv[1:]:
    card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    card.bind((name, 0))
    cards[card] = name
print("ready", flush=True)
while True:
    for one in select.select([*cards, sys.stdin], [], [])[0]:
        if one is sys.stdin:
            sys.exit()
        print(cards[one], one.recv(4096).hex(), flush=True)
"""
WAKE = "import sys; from tpimpi.system.wake import macs_of, wake; wake(list(macs_of(sys.argv[1]).values()))"


@pytest.mark.alone
def test_every_card_gets_a_magic_packet_over_every_network(tmp_path: Path) -> None:
    """As AMD's Magic Packet Technology (publication 20213) has it: six bytes of ff, then the card's address sixteen times,
    anywhere in a frame to all; a card that sleeps has no IP, and looks at frames."""
    hostfile = tmp_path / "home.txt"
    hostfile.write_text("desk\npi slots=2 # 00:11:22:33:44:5f\nmini # 0A-1b-22-33-44-55\n")
    with Pair() as pair:
        second = f"link add eth1 netns {pair.a} type veth peer name eth1 netns {pair.b}"
        steps = [second, f"-n {pair.a} addr add 10.99.1.1/24 dev eth1"]
        steps += [f"-n {name} link set {interface} up" for name in (pair.a, pair.b) for interface in ("eth0", "eth1")]
        for step in [*steps, f"-n {pair.a} link set docker1 up"]:
            assert pair.do(*step.split()).returncode == 0, step
        watched = {pair.b: ["eth0", "eth1"], pair.a: ["docker1"]}
        listening = [
            subprocess.Popen(
                pair.on(name, sys.executable, "-c", CARDS, *cards),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, cards in watched.items()
        ]
        for process in listening:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        sent = subprocess.run(
            pair.on(pair.a, sys.executable, "-c", WAKE, str(hostfile)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        frames = [
            line.split() for process in listening for line in process.communicate(timeout=TIMEOUT)[0].splitlines()
        ]
    assert (sent.returncode, sent.stderr) == (0, "")
    to_all = [(card, frame) for card, frame in frames if frame[:12] == ALL and frame[24:28] == ETHERTYPE_IPV4]
    for mac in ("00112233445f", "0a1b22334455"):
        magic = ALL + 16 * mac
        assert sorted(card for card, frame in to_all if magic in frame) == ["eth0", "eth1"]
    assert len(to_all) == 4, "nothing else, and nothing to containers"


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_module, "interfaces", list)
    with pytest.raises(StarError, match=r"--wake: no packet could be sent on any network \(there is none\)"):
        wake(["00:11:22:33:44:55"])


def test_addresses_of_cards(tmp_path: Path) -> None:
    lines = ["desk", "pi slots=2 # 00:11:22:33:44:5f", "# 00:00:00:00:00:00", "mini:2 # 0A-1b-22-33-44-55 x"]
    lines += ["tv # mac:00:11:22:33:44:56", "nuc # 00-11-22-33-44-57: upstairs"]
    # Comments that are no addresses of cards.
    lines += ["a # bought 2024-01-15, wakes at 12:30:00", "b # 2024-01-15T12:30:00", "c # fe80::211:22ff:fe33:4455"]
    lines += ["d # 2001:db8:1:2:3:4:5:6", "e # call 491761234567", "f # not-to-be-put-off", "g # 192.168.178.20, cafe"]
    (tmp_path / "hosts").write_text("".join(f"{line}\n" for line in lines))
    assert macs_of(str(tmp_path / "hosts")) == {
        "pi": "00:11:22:33:44:5f",
        "mini": "0A-1b-22-33-44-55",
        "tv": "00:11:22:33:44:56",
        "nuc": "00-11-22-33-44-57",
    }


@pytest.mark.parametrize(
    "given",
    [
        "00:11-22:33-44:55",
        "00:11:22:33:44",
        "00:11:22:33:44:55:66",
        "00:11:22:33:44:550",
        "00:11:22:33:44:5g",
        "0:11:22:33:44:55",
        "0011.2233.4455",
        "00112233445f",
    ],
)
def test_an_address_that_is_not_whole_is_not_called_a_missing_one(tmp_path: Path, given: str) -> None:
    (hosts := tmp_path / "hosts").write_text(f"desk\nmini # 0A-1b-22-33-44-55\npi:2  # card {given}, upstairs\n")
    remedy = "write six pairs of digits, as: pi # 00:11:22:33:44:55"
    with pytest.raises(
        InputError,
        match=rf"^--wake: '{re.escape(given)}' in line 3 of {hosts} is no address of a network card; {remedy}$",
    ):
        macs_of(str(hosts))
    hosts.write_text("desk\npi # upstairs\n")
    with pytest.raises(
        InputError, match=rf"^--wake: no line of {hosts} has the address of a network card; write it there"
    ):
        macs_of(str(hosts))
