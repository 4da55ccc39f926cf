"""bench/peers: other programs in their own environments and on devices, with small ones of ours in their place."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import home, limits
from bench.peers import peers
from tests.support.homes import LACKING, needs_home
from tests.support.launch import run_command
from tests.support.tiny_models import write_tiny_hf
from tests.support.waiting import until

pytestmark = pytest.mark.alone

needs_limits = pytest.mark.skipif(
    LACKING is not None or limits.available("cpu") is not None, reason=LACKING or "no control groups"
)
SLOW = 0.05  # seconds that the fake program takes for a token
# Counts up from the last id of the prompt; its first prompt takes longer than the second.
COUNTER = f"""
import time
import timed

def load():
    prompts = []
    def generate(prompt, tokens, on_token):
        time.sleep(0 if prompts else 0.2)
        prompts.append(prompt)
        for i in range(tokens):
            time.sleep({SLOW})
            on_token(prompt[-1] + 1 + i)
    return generate

parser = timed.parser(None)
parser.add_argument("--memory")
options = parser.parse_args()
timed.report(load, options, ("pytest",), said=[options.memory, options.model.read_text(), options.threads])
"""


@pytest.fixture(scope="module")
def one() -> Iterator[Any]:
    """A home of one device without limits."""
    with home.Home(1) as made:
        yield made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes "fake" a peer that is this Python program, without an environment of its own."""

    def make(program: str) -> None:
        path = tmp_path / "fake.py"
        path.write_text(program)
        shutil.copy(peers.PROGRAMS / "timed.py", tmp_path)
        peer = peers.Peer("none", str(path), "hf", ("--memory", "{memory}"), prepares=True)
        monkeypatch.setitem(peers.PEERS, "fake", peer)
        monkeypatch.setitem(peers.ENVIRONMENTS, "none", peers.Environment(()))
        monkeypatch.setattr(peers, "make_environment", lambda name, folder: Path(sys.executable))

    return make


def run(where: Any, folder: Path, timeout: float = 60.0, tokens: int = 4) -> dict[str, Any]:
    model = folder / "model.gguf"
    model.write_text("weights")
    return peers.run_peer(
        where,
        "fake",
        model,
        prompt=[1, 7],
        tokens=tokens,
        threads=2,
        context=64,
        environments=folder,
        timeout=timeout,
    )


# Running


@needs_home
def test_what_a_run_gives(one: Any, fake: Callable[[str], None], tmp_path: Path) -> None:
    fake(COUNTER)
    figures = run(one, tmp_path)
    assert set(figures) == {*peers.FIGURES, "said"}
    assert figures["token_ids"] == [8, 9, 10, 11]
    assert figures["ttft_s"] >= 0.2 + SLOW
    assert SLOW <= figures["ttft_warm_s"] < 0.2 + SLOW
    assert figures["s_per_token"] >= SLOW
    assert figures["versions"] == {"python": sys.version.split()[0], "pytest": pytest.__version__}
    assert 5_000_000 < figures["peak_rss_bytes"] < 100_000_000
    assert figures["said"] == ["0", "weights", 2]  # the device has no limit


@needs_home
@pytest.mark.slow
def test_one_token_has_no_steps(one: Any, fake: Callable[[str], None], tmp_path: Path) -> None:
    fake(COUNTER)
    assert run(one, tmp_path, tokens=1)["s_per_token"] is None


@needs_limits
@pytest.mark.slow
def test_a_run_that_the_memory_limit_kills(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("import sys; print(len(b'x' * 200_000_000), sys.argv)")
    with home.Home([home.Device("small", memory=64_000_000)]) as small:
        assert run(small, tmp_path) == {"killed": "out of memory"}
        fake(COUNTER)
        assert run(small, tmp_path)["said"][0] == "64000000"


@needs_home
@pytest.mark.slow
def test_a_run_that_gets_no_memory(one: Any, fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("bytearray(1 << 60)")
    assert run(one, tmp_path) == {"killed": "out of memory"}


@needs_home
@pytest.mark.slow
def test_a_run_that_takes_too_long_is_killed_with_what_it_started(
    one: Any, fake: Callable[[str], None], tmp_path: Path
) -> None:
    fake("import subprocess; subprocess.run(['sleep', '100'])")
    start = time.monotonic()
    assert run(one, tmp_path, timeout=1.0) == {"killed": "took over 1 s"}
    assert time.monotonic() - start < 20
    while one.pids(0):  # the killed are not gone at once
        assert time.monotonic() - start < 20
        time.sleep(0.01)


@needs_home
@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise ValueError('no such layer')", "fake ended with 1: .*ValueError: no such layer$"),
        ("raise SystemExit(3)", "fake ended with 3: it said nothing"),
        ("print('done')", "fake printed no figures; its last line is 'done'"),
        ("print('{\"load_s\": 1}')", "fake printed figures without ttft_s, ttft_warm_s"),
    ],
)
@pytest.mark.slow
def test_a_run_that_fails(one: Any, fake: Callable[[str], None], tmp_path: Path, program: str, message: str) -> None:
    fake(program)
    with pytest.raises(peers.PeerError, match=message):
        run(one, tmp_path)


def test_unknown_peers_and_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(peers.PeerError, match="unknown peer 'gpt'; known are transformers, "):
        peers.make_environment("gpt", tmp_path)
    with pytest.raises(peers.PeerError, match=r"none: there is no such file"):
        peers.drop_from_page_cache(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="no way to ask what the page cache holds")
def test_the_page_cache_is_dropped(tmp_path: Path) -> None:
    from tpimpi.system.disk import mount_of

    if (kind := mount_of(tmp_path).kind) not in ("ext4", "xfs", "btrfs"):
        pytest.skip(f"{kind} is in memory, or may not tell")
    (tmp_path / "model").mkdir()
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    (tmp_path / "model" / "link").symlink_to(path)

    def cached() -> bool:
        with path.open("rb", buffering=0) as file:
            try:
                return os.preadv(file.fileno(), [bytearray(1 << 20)], 0, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                return False

    path.read_bytes()
    assert cached()

    def dropped() -> bool:  # a page that the kernel has in hand just then stays
        peers.drop_from_page_cache(tmp_path / "model")
        return not cached()

    until(dropped)


COPIES = """
import sys
from pathlib import Path
import run_transformers, torch
from transformers import AutoModelForCausalLM

torch.set_grad_enabled(False)
where = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
where |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map=where)

def look():
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1].endswith(".safetensors")]
    found = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
    inside = sum(any(low <= parameter.data_ptr() < high for low, high in mapped) for parameter in found)
    ids = []
    run_transformers.generator(model)([3, 4, 5], 6, ids.append)
    return len(list(model.parameters())), len(found), inside, *ids

print(look())
run_transformers.copy(model)
print(look())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_what_is_copied_is_no_longer_mapped_and_what_is_on_the_disk_stays_there(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    write_tiny_hf(tmp_path / "model", "llama", dtype="bfloat16")
    done = run_command([sys.executable, "-c", COPIES, str(tmp_path / "model")], env={"PYTHONPATH": str(peers.PROGRAMS)})
    assert done.code == 0, done.err
    before, after = (ast.literal_eval(line) for line in done.out.splitlines())
    # Embedding, norm, head, and 9 of each of 3 layers, of which one is on the disk
    assert before[:3] == (30, 21, 21)
    assert after[:3] == (30, 21, 0)
    assert before[3:] == after[3:] and len(after) == 3 + 6


# Preparing


def test_a_model_is_prepared_once(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("import pathlib, sys; pathlib.Path(sys.argv[4]).mkdir(); pathlib.Path(sys.argv[4], 'layer').touch()")
    model = tmp_path / "llama"
    model.mkdir()
    (model / "weights").write_text("1")
    ready = peers.prepare("fake", model, tmp_path / "work")
    (ready / "layer").write_text("first")
    assert peers.prepare("fake", model, tmp_path / "work") == ready
    assert (ready / "layer").read_text() == "first"
    (model / "weights").write_text("12")
    assert peers.prepare("fake", model, tmp_path / "work") == ready
    assert (ready / "layer").read_text() == ""
    assert peers.prepare("transformers", model, tmp_path / "other") == model
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_prepared_is_tried_again(fake: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "model").write_text("1")
    for _ in range(2):
        fake("import pathlib, sys; pathlib.Path(sys.argv[4]).mkdir(); sys.exit('no index')")
        with pytest.raises(peers.PeerError, match=r"fake cannot prepare .*model: no index"):
            peers.prepare("fake", tmp_path / "model", tmp_path / "work")


# Environments


def wheel(folder: Path, version: str) -> str:
    """A package "toy" for pip."""
    path = folder / f"toy-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("toy.py", f"version = {version!r}\n")
        file.writestr(f"toy-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
        file.writestr(
            f"toy-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"toy-{version}.dist-info/RECORD", "")
    return str(path)


@pytest.mark.slow
def test_an_environment_is_made_once_and_again_when_it_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer("shared", "none.py", "gguf"))
    folder = tmp_path / "environments"
    for version in ("1", "2"):
        monkeypatch.setitem(peers.ENVIRONMENTS, "shared", peers.Environment((wheel(tmp_path, version),)))
        python = peers.make_environment("one", folder)
        assert f"peers: making the environment of one in {folder / 'shared'} (" in capfd.readouterr().err
        assert peers.make_environment("two", folder) == python
        assert capfd.readouterr().err == ""
        assert (python.parent.parent / "pyvenv.cfg").exists()
        installed = next(python.parent.parent.glob("lib/python*/site-packages/toy.py"))
        assert installed.read_text() == f"version = {version!r}\n"


def test_an_environment_that_pip_cannot_make_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(peers.PEERS, "one", peers.Peer("broken", "none.py", "gguf"))
    monkeypatch.setitem(peers.ENVIRONMENTS, "broken", peers.Environment((str(tmp_path / "toy-1-py3-none-any.whl"),)))
    for _ in range(2):
        message = rf"the environment of one cannot be made \(.*toy.*\); see {re.escape(str(tmp_path))}/broken.log"
        with pytest.raises(peers.PeerError, match=message):
            peers.make_environment("one", tmp_path)


def test_the_table_fixes_all_versions_and_its_programs_are_not_ours() -> None:
    for peer in peers.PEERS.values():
        environment = peers.ENVIRONMENTS[peer.environment]
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in environment.requirements)
        assert (peers.PROGRAMS / peer.program).exists()
    for program in peers.PROGRAMS.glob("*.py"):
        for node in ast.walk(ast.parse(program.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "tpimpi" for name in names)
