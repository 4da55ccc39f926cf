"""bench/attack: the attacks get the whole conversation from plain links, and nothing from sealed ones.

docs/threat-model.md cites these tests: what it says is what they show.
"""

from __future__ import annotations

import datetime
import functools
import json
import platform
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bench.attack import frames, runs
from bench.attack.messages import Message, hidden_vectors, read_messages, residual, steps_of
from bench.attack.public import PublicModel, numbers
from bench.attack.rows import RowIndex, nearest_rows
from bench.attack.table import in_common, tokens_of_bytes, tokens_of_sums, tokens_of_vectors
from bench.attack.vocabulary import Vocabulary
from tests.support.homes import needs_home
from tests.support.launch import ROOT, Launcher, run_command
from tests.support.tiny_models import write_tiny_hf
from tpimpi.compute.formats.packed import encode
from tpimpi.system.link_keys import PATH_VARIABLE, make_keys, write_keys

PROMPT = "Write to my landlord: the kitchen tap has dripped since Monday, and nobody came. I want it mended by Friday."
TOKENS = 12
WIRES = ("f32", "bf16", "q8_0")


@dataclass(frozen=True)
class Recorded:
    """A run: what rank 1 got, what its process opened, and the ids that were said."""

    model: PublicModel
    messages: list[Message]
    opened: list[Message]
    prompt: list[int]
    answer: list[int]

    @property
    def sent(self) -> list[int]:
        """The tokens whose rows went to the other ranks."""
        return [*self.prompt, *self.answer[:-1]]


@functools.cache
def public_model(path: Path) -> PublicModel:
    """One of them for all tests."""
    return PublicModel(path)


@functools.cache
def row_index(path: Path, wire: str) -> RowIndex:
    """One of them for all tests."""
    return RowIndex(public_model(path).table_on_the_wire(wire))


def record(
    mpirun: Launcher, env: dict[str, str], out: Path, model: Path, *options: str, prompt: str = PROMPT
) -> Recorded:
    """The prompt's run on two ranks."""
    out.mkdir()
    (out / "prompt.txt").write_text(prompt)
    said = ("--model", str(model), "--prompt-file", str(out / "prompt.txt"), "--max-tokens", str(TOKENS))
    said = (*said, "--ignore-eos", "--speculate", "off", "--allreduce", "star", "--report", str(out / "report.json"))
    command = ("-m", "bench.attack.record", str(out), "--opened", "--")
    result = mpirun(2, *command, *said, *options, env=env, cwd=ROOT)
    assert result.code == 0, result.err
    public = public_model(model)
    answer = json.loads((out / "report.json").read_text())["token_ids"]
    assert len(answer) == TOKENS
    messages, opened = (list(read_messages(out / f"rank-1.{kind}")) for kind in ("messages", "opened"))
    return Recorded(public, messages, opened, public.tokenizer.encode_chat(prompt), answer)


@pytest.fixture
def link_keys(tmp_path: Path, cache: dict[str, str]) -> dict[str, str]:
    """The environment of a host that has link keys."""
    keys = make_keys([platform.node()], datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    return {**cache, PATH_VARIABLE: str(write_keys(keys[platform.node()], tmp_path / "keys" / "keys.json"))}


# Messages of a rank


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.slow_but("f32")
def test_plain_messages_give_the_whole_conversation(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path, wire: str
) -> None:
    run = record(mpirun, cache, tmp_path / "out", smollm2, "--wire", wire)
    assert len(run.prompt) > 32  # so that it goes through the layers in two halves
    assert tokens_of_vectors(run.messages, wire, run.model) == run.sent
    index = row_index(smollm2, wire)
    assert tokens_of_bytes([message.data for message in run.messages], index) == run.sent
    # Heads are computed in other formats here and there, which decides between tokens that are about as likely.
    answer = tokens_of_sums(run.messages, wire, run.model)
    assert len(answer) == TOKENS and in_common(answer, run.answer) >= TOKENS - 1
    if wire == "f32":
        return
    shown = run_command(  # the same as a command
        [sys.executable, "-m", "bench.attack", "messages", str(tmp_path / "out/rank-1.messages"), "--wire", wire],
        env={"TPIMPI_MODEL": str(smollm2)},
        cwd=ROOT,
    )
    assert shown.code == 0 and PROMPT in shown.out, shown.err


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.slow_but("f32")
def test_sealed_messages_give_nothing_but_to_the_rank_itself(
    mpirun: Launcher, link_keys: dict[str, str], smollm2: Path, tmp_path: Path, wire: str
) -> None:
    run = record(mpirun, link_keys, tmp_path / "out", smollm2, "--wire", wire, "--seal", "on")
    assert tokens_of_vectors(run.messages, wire, run.model) == []
    index = row_index(smollm2, wire)
    assert tokens_of_bytes([message.data for message in run.messages], index) == []
    assert tokens_of_sums(run.messages, wire, run.model) == []
    private = json.loads(Path(link_keys[PATH_VARIABLE]).read_text())["private"]
    for key in (private.encode(), bytes.fromhex(private)):
        assert not [message for message in [*run.messages, *run.opened] if key in message.data]
    assert len(steps_of(run.messages)) == TOKENS, "the recorder saw too little"
    # The owner of the rank, or root there, reads the process: sealing does not help against them.
    assert tokens_of_vectors(run.opened, wire, run.model) == run.sent
    assert in_common(tokens_of_sums(run.opened, wire, run.model), run.answer) >= TOKENS - 1


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere2", "olmo2", "exaone4", "glm4", "qwen3-moe"])
@pytest.mark.slow_but("gemma2")
def test_families_differ_in_nothing_that_helps(
    mpirun: Launcher, cache: dict[str, str], tiny: Path, tmp_path: Path, kind: str
) -> None:
    """Scaled embeddings, norms after blocks, parallel blocks, queries and keys normed over all heads, experts."""
    model = write_tiny_hf(tmp_path / kind, kind, vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, model / name)
    run = record(mpirun, cache, tmp_path / "out", model, "--format", "f32", prompt="the lazy dog")
    assert tokens_of_vectors(run.messages, "f32", run.model) == run.sent
    assert tokens_of_sums(run.messages, "f32", run.model) == run.answer


def test_vectors_after_a_layer_give_the_tokens(
    mpirun: Launcher, cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    """Leaving out the hidden vectors, and the sums of the first layers, would not help."""
    run = record(mpirun, cache, tmp_path / "out", tiny, "--format", "f32", prompt="the lazy dog")
    after = [residual(step, "f32", run.model, layers=1) for step in steps_of(run.messages)]
    vectors = np.concatenate(after)
    begun = np.concatenate(hidden_vectors(steps_of(run.messages), "f32", run.model))
    assert vectors.shape == begun.shape and np.abs(vectors - begun).max() > 0.1
    assert Vocabulary(run.model, layers=1).tokens(vectors) == run.sent
    rng = np.random.default_rng(1)
    assert Vocabulary(run.model, layers=1).tokens(rng.standard_normal(vectors.shape).astype(np.float32)) == []


# Frames between machines


@needs_home
@pytest.mark.alone
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.slow_but("f32")
def test_frames_give_the_whole_conversation_or_nothing_where_sealed(
    mpirun: Launcher, smollm2: Path, tmp_path: Path, wire: str
) -> None:
    model, slices = public_model(smollm2), runs.make_slices(smollm2, tmp_path / "slices")
    index, prompt = row_index(smollm2, wire), model.tokenizer.encode_chat(PROMPT)
    with runs.home_with_keys(tmp_path / "keys") as home:
        for sealed in (False, True):
            recording = runs.record_run(
                home,
                tmp_path / f"run-{sealed}",
                slices,
                [PROMPT],
                mpi=mpirun.mpi,
                wire=wire,
                sealed=sealed,
                tokens=TOKENS,
            )
            assert recording.lost_frames == 0
            parts = [part for some in frames.streams(recording.frames).values() for part in some]
            assert sum(map(len, parts)) > 1e6 / (4 if wire == "q8_0" else 1), "the capture saw too little"
            found = tokens_of_bytes(parts, index)
            assert found == ([] if sealed else [*prompt, *recording.answers[0][:-1]])
            # Nor does the launcher, which shares the network, carry the text.
            assert not [part for part in parts if b"landlord" in part]


def _frame(sequence: int, data: bytes, *, flags: int = 0x10, ports: bytes = b"\1\2\3\4") -> bytes:
    tcp = ports + struct.pack("!IIBBHHH", sequence & 0xFFFFFFFF, 0, 0x80, flags, 0, 0, 0) + bytes(12) + data
    ip = struct.pack("!BBHIBBH", 0x45, 0, 20 + len(tcp), 0, 64, 6, 0) + b"\x0a\0\0\1" + b"\x0a\0\0\2"
    return bytes(12) + b"\x08\0" + ip + tcp


def test_streams_are_what_tcp_carried(tmp_path: Path) -> None:
    """Out of order, sent again in other cuts, over the end of the numbers, and with a hole; other frames are left out."""
    data = bytes(range(256)) * 8
    start = 0xFFFFFFFF - 300
    cuts = [(0, 100), (200, 500), (100, 220), (450, 900), (0, 50), (1000, 2048), (1500, 2048)]
    made = [_frame(start - 1, b"", flags=2), *(_frame(start + first, data[first:last]) for first, last in cuts)]
    made += [bytes(60), b"\xff" * 80, _frame(7, b"other", ports=b"\1\2\3\5"), _frame(start, b"")]
    path = tmp_path / "frames.pcap"
    with path.open("wb") as file:
        file.write(frames.FILE_HEAD.pack(frames.MAGIC, 2, 4, 0, 0, 65535, frames.ETHERNET))
        for frame in made:
            file.write(frames.FRAME_HEAD.pack(0, 0, len(frame), len(frame)) + frame)
    assert list(frames.streams(path).values()) == [[data[:900], data[1000:]], [b"other"]]
    for bad in (b"", bytes(24), path.read_bytes()[:20] + bytes(4)):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(frames.InputError, match="no capture of Ethernet frames"):
            frames.streams(tmp_path / "bad")


# Finding rows


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)


@pytest.mark.parametrize("wire", WIRES)
def test_rows_are_found_wherever_they_stand(table: np.ndarray, wire: str) -> None:
    rng = np.random.default_rng(2)
    table = table.copy()
    table[7] = 0  # a row that tells nothing
    rows = encode(table, wire)
    index = RowIndex(rows)
    noise = rng.integers(0, 256, 100_003, dtype=np.uint8).tobytes()
    assert index.find(noise) == [] == index.find(b"") == index.find(bytes(10_000))
    tokens = [5, 6, 6, 999, 5, 0]
    data, starts = noise[:1001], []
    for number, token in enumerate(tokens):
        row = rows[token].tobytes()
        starts.append(len(data))
        cut = rows.shape[1] // 3
        data += row if number != 3 else row[:cut] + b"a header of the library's" + row[cut:]
        data += b"" if number in (1, 2) else noise[:77]  # 6, 6 and 999 without a gap
    assert [found.token for found in index.find(data)] == tokens
    assert index.find(data)[0].start == starts[0]
    assert [found.token for found in index.find(rows[7].tobytes() + data)] == tokens


@pytest.mark.parametrize("wire", WIRES)
def test_rounded_rows_are_the_nearest(table: np.ndarray, wire: str) -> None:
    rounded = np.array([numbers(row.tobytes(), wire) for row in encode(table[:300], wire)])
    assert nearest_rows(rounded, table) == list(range(300))
    rng = np.random.default_rng(3)
    any_bytes: Callable[[], np.ndarray] = lambda: numbers(rng.bytes(64 * 68), wire)  # noqa: E731
    with np.errstate(all="ignore"):
        assert set(nearest_rows(any_bytes()[:640].reshape(-1, 64), table)) == {-1}
