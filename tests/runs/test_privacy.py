"""No rank but 0 gets text, token ids, rows of the embedding's indices, or logits: every message of a run is looked at."""

from __future__ import annotations

import ast
import functools
import json
import pickle
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import tpimpi
from tests.support.launch import PROGRAMS, Launcher
from tests.support.messages import patterns_in
from tests.support.privacy import RUN, VOCAB, Message, leaks, patterns_of, words_of_steps
from tpimpi.engine.batch import unpack_rows
from tpimpi.engine.protocol import Operation
from tpimpi.star import BULK, CONTROL, HIDDEN, NOTE, PARTIAL, SUM
from tpimpi.weights import stream
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name

PROMPT = "Zanzibar ornithologist whispers quixotic melodies about elderberries. Please continue the story."
HIDDEN_SIZE = 576


def odd_parcels(messages: list[Message], slices: Path) -> list[str]:
    """What there is in BULK messages beside the tiles of the receiver's own slice, each whole, and the end.

    Weights hold any bytes there are, so these are not searched; that they are weights is what is checked.
    """
    found, tiles = [], {}
    for destination, _, data in messages:
        message = np.frombuffer(data, np.uint8)
        size = sum(24 + -(-piece.nbytes // 8) * 8 for _, _, piece in stream.frames(message))
        if size != len(data):
            found.append(f"a message of {len(data)} bytes with frames of {size}")
        for index, kind, piece in stream.frames(message):
            if kind in (stream.DATA, stream.CHECKSUM):
                tile = tiles.setdefault((destination, index), {stream.DATA: bytearray(), stream.CHECKSUM: bytearray()})
                tile[kind] += piece.tobytes()
            elif (index, kind, piece.nbytes) != (0, stream.END, 0):
                found.append(f"a frame of kind {kind} with {piece.nbytes} bytes to rank {destination}")
    files = {rank: SliceFile(slices / slice_name(rank, 3)) for rank in {destination for destination, _ in tiles}}
    for (destination, index), sent in tiles.items():
        file = files[destination]
        record = file.records[index]
        wanted, checksum = b"", xxhash.xxh3_64()
        loaded = file.load(record)
        for part in record.parts:
            wanted += (loaded.matrices[part.name].data if part.is_matrix else loaded.parts[part.name]).tobytes()
        checksum.update(wanted)
        if destination == 0 or record.block.kind not in ("attn", "mlp", "resident"):
            found.append(f"{record.path} to rank {destination}")
        if sent != {stream.DATA: wanted, stream.CHECKSUM: checksum.intdigest().to_bytes(8, "little")}:
            found.append(f"bytes that are not {record.path} of rank {destination}")
    for file in files.values():
        file.close()
    return found


@pytest.fixture(scope="module")
def recorded(mpirun: Launcher, cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("recorded")
    (out / "prompt.txt").write_text(PROMPT)
    (out / "stop.txt").write_text("Kumquat\n")
    result = mpirun(
        3,
        *(str(PROGRAMS / "recorded_run.py"), str(out), "--prompt-file", str(out / "prompt.txt")),
        *("--max-tokens", "24", "--report", str(out / "report.json"), "--stop-file", str(out / "stop.txt")),
        *("--memory", "400M", "--trace", str(out / "trace.json")),
        env={**cache, "TPIMPI_CACHE": str(out / "cache")},  # so that slices are made, and sent
    )
    assert result.code == 0, result.err
    report = json.loads((out / "report.json").read_text())
    return out, report


def _ids(report: dict[str, object], smollm2: Path) -> list[int]:
    from tpimpi.serving.text.load import load_tokenizer
    from tpimpi.weights.sources import open_source

    with open_source(smollm2) as source:
        prompt = load_tokenizer(source.tokenizer_assets(), source.config.vocab).encode_chat(PROMPT)
    return [*prompt, *report["token_ids"]]  # type: ignore[misc]


def _words(report: dict[str, object]) -> set[str]:
    words = set(re.findall(r"\w{5,}", f"{PROMPT} {report['text']} Kumquat")) - _own_words()
    assert len(words) > 10
    return words


@functools.cache
def _own_words() -> frozenset[str]:
    """Words of the program's own names and short texts, which its settings and figures use for themselves."""
    own: set[str] = set()
    for path in Path(tpimpi.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # a field
                own.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 40:
                own.update(re.findall(r"\w{5,}", node.value))
    return frozenset(own)


def test_messages_give_nothing_away(recorded, smollm2: Path) -> None:
    out, report = recorded
    words, ids = _words(report), _ids(report, smollm2)
    assert len(report["token_ids"]) > 10
    for rank in range(3):
        messages = pickle.loads((out / f"messages-{rank}.pickle").read_bytes())
        sums = 60 * (len(report["token_ids"]))
        assert sum(tag in (SUM, PARTIAL) for _, tag, _ in messages) >= sums, "the recorder saw too little"
        assert leaks(messages, words, ids) == []


@pytest.mark.slow
def test_a_batch_gives_nothing_away(mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path) -> None:
    """The words of a step say which rows of which sequence it has, and where their pages are, and nothing else."""
    lines = [{"custom_id": name, "prompt": PROMPT} for name in ("Pomegranate", "Persimmon", "Mangosteen")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--batch-file", "in.jsonl", "--out", "out", "--max-tokens", "24")
    options = (*options, "--report", "report.json", "--memory", "400M")
    result = mpirun(3, str(PROGRAMS / "recorded_run.py"), str(tmp_path), *options, env=cache, cwd=tmp_path)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "report.json").read_text())
    words, ids = _words(report) | {line["custom_id"] for line in lines}, _ids(report, smollm2)
    asked = set()
    for rank in range(3):
        rest, steps = words_of_steps(pickle.loads((tmp_path / f"messages-{rank}.pickle").read_bytes()))
        assert leaks(rest, words, ids) == []
        for operation, data in steps:
            asked.add(operation)
            if operation in (Operation.STEP, Operation.PROMPT_STEP):  # every number is used, or this raises
                rows = unpack_rows(np.frombuffer(data, "<i8"), [1000, 1000], 8192)
                assert (np.diff(rows.position)[np.diff(rows.sequence) == 0] == 1).all()
            else:
                assert len(data) == 24 or operation == Operation.RELEASE
    assert asked >= {Operation.PAGES, Operation.STEP}


@pytest.mark.slow
def test_kept_keys_and_values_give_nothing_away(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path
) -> None:
    """Neither what is said while they are written and read, nor the files; no rank but 0 keeps the key."""
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = ("--prompt-file", "prompt.txt", "--max-tokens", "24", "--report", "report.json", "--session", "session")
    for run in range(2):
        arguments = (str(PROGRAMS / "recorded_run.py"), str(tmp_path), *options, "--keep-cache", "kept")
        result = mpirun(3, *arguments, env=cache, cwd=tmp_path)
        assert result.code == 0, result.err
        report = json.loads((tmp_path / "report.json").read_text())
        assert (report["answers"][0]["cached_tokens"] > 0) == bool(run)
        words, ids = _words(report), _ids(report, smollm2)
        patterns = patterns_of(words, ids)
        for rank in range(3):  # hidden vectors and sums are looked at elsewhere
            messages = pickle.loads((tmp_path / f"messages-{rank}.pickle").read_bytes())
            assert leaks([m for m in messages if m[1] not in (HIDDEN, PARTIAL, SUM)], words, ids) == []
        controls = pickle.loads((tmp_path / "messages-0.pickle").read_bytes())
        asked = {int(np.frombuffer(data, "<i8")[1]) for _, tag, data in controls if tag == CONTROL}
        assert asked >= ({Operation.TAKE, Operation.KEEP} if run else {Operation.KEEP})
        entry = json.loads((tmp_path / "session.cache").read_text())
        files = sorted((tmp_path / "kept").iterdir())
        assert [file.name for file in files] == [f"{entry['name']}-r{rank}.kv" for rank in range(3)]
        for file in files:
            kept = file.read_bytes()
            assert len(kept) > 100_000 and patterns_in(kept, patterns) == []
            keys = [entry["key"].encode(), bytes.fromhex(entry["key"]), entry["hash"].encode()]
            assert not any(key in kept for key in keys)


@pytest.mark.slow
def test_slices_bring_tiles_and_nothing_else(recorded) -> None:
    out, _ = recorded
    (slices,) = (out / "cache").glob("*-v2")
    messages = pickle.loads((out / "messages-0.pickle").read_bytes())
    bulk = [message for message in messages if message[1] == BULK]
    assert {destination for destination, _, _ in bulk} == {1, 2}
    assert sum(len(data) for _, _, data in bulk) > 30e6, "the recorder saw too little"
    assert odd_parcels(bulk, slices) == []
    for rank in (1, 2):
        others = pickle.loads((out / f"messages-{rank}.pickle").read_bytes())
        assert not [message for message in others if message[1] == BULK]
    # The search finds what is not a tile.
    destination, tag, data = bulk[0]
    more = np.array([0, stream.DATA, 8], "<u8").tobytes() + b"Zanzibar"
    assert odd_parcels([*bulk, (1, BULK, more)], slices)
    assert odd_parcels([(3 - destination, tag, data), *bulk[1:]], slices)
    assert odd_parcels([(destination, tag, data[:100] + bytes([data[100] ^ 1]) + data[101:]), *bulk[1:]], slices)


def test_the_search_finds_what_it_looks_for(recorded, smollm2: Path) -> None:
    _, report = recorded
    words, ids = _words(report), _ids(report, smollm2)
    zeros = bytes(HIDDEN_SIZE * 4 - 4 * RUN)
    assert leaks([(1, HIDDEN, np.array(ids[3 : 3 + RUN], "<i4").tobytes() + zeros)], words, ids)
    assert leaks([(1, HIDDEN, np.array(ids[-RUN:], "<f4").tobytes() + zeros)], words, ids)
    assert leaks([(1, NOTE, json.dumps({"x": "Zanzibar"}).encode())], words, ids)
    for encode in (json.dumps, msgspec.json.encode):
        note = encode([7, *ids[:RUN], 7])
        assert leaks([(1, NOTE, note if isinstance(note, bytes) else note.encode())], words, ids)
    # Figures in which two ids of the conversation stand by chance: the end of a turn is 198, 1.
    assert {198, 1} <= set(ids) and not leaks([(1, NOTE, json.dumps({"pages": [2198, 13, 7]}).encode())], words, ids)
    assert leaks([(1, HIDDEN, bytes(VOCAB * 4))], words, ids)
    assert leaks([(2, CONTROL, np.array([0, 2, 1, ids[0] + 40_000, 0], "<i8").tobytes())], words, ids)
    assert leaks([(2, CONTROL, np.array([0, 2, 1, 1, ids[0]], "<i8").tobytes())], words, ids)
    assert not leaks([(2, CONTROL, np.array([0, 2, 1, 1, 0], "<i8").tobytes())], words, ids)
    assert leaks([(2, 99, b"")], words, ids)


@given(st.data())
def test_the_quick_search_finds_what_a_plain_one_does(data: st.DataObject) -> None:
    byte = st.sampled_from([0, 1, 255])
    patterns = data.draw(
        st.lists(st.lists(byte, min_size=1, max_size=9).map(bytes), min_size=1, max_size=6, unique=True)
    )
    searched = data.draw(
        st.lists(st.one_of(byte.map(lambda one: bytes([one])), st.sampled_from(patterns))).map(b"".join)
    )
    named = [(str(number), pattern) for number, pattern in enumerate(patterns)]
    assert patterns_in(searched, named) == [name for name, pattern in named if pattern in searched]


def test_other_ranks_show_nothing_outside(recorded) -> None:
    out, report = recorded
    for rank in (1, 2):
        seen = json.loads((out / f"outside-{rank}.json").read_text())
        assert "recorded_run.py" in seen["arguments"]
        for word in _words(report):
            assert word not in seen["arguments"]
            assert word not in seen["environment"]
        files = [Path(name).name for name in seen["files"]] + re.findall(r"[^/\s]+$", seen["mapped"], re.MULTILINE)
        assert f"rank-{rank}-of-3.h5" in files, "its own slice is not even open: the test sees nothing"
        assert not {"rank-0-of-3.h5", "prompt.txt", "stop.txt", "report.json"} & set(files)
        assert not [name for name in files if name.endswith((".gguf", "tokenizer.json", ".model"))]
        # And in its slice there is no embedding, head or tokenizer: see tests/weights/test_slice_file.py.


def test_other_ranks_import_neither_serving_nor_the_options(recorded) -> None:
    """What is not there cannot leak, and takes no memory."""
    out, _ = recorded
    for rank in (1, 2):
        modules = json.loads((out / f"outside-{rank}.json").read_text())["modules"]
        assert "tpimpi.engine.model" in modules, "the run is not even there: the test sees nothing"
        assert [name for name in modules if name.startswith(("tpimpi.serving", "tokenizers", "jinja2"))] == []
        assert [name for name in modules if name.startswith(("tpimpi.weights.sources", "tpimpi.weights.build"))] == []
        # A rank without weights is to be small: OpenSSL (of secrets, hashlib) takes 4 MB, and nothing needs it.
        assert not {"_hashlib", "secrets", "argparse", "torch", "typing_extensions"}.intersection(modules)
        assert not {"concurrent.futures", "difflib", "gguf", "numpy.ma", "random", "statistics"}.intersection(modules)
        assert {name for name in modules if name.startswith("tpimpi.cli.")} == {
            *("tpimpi.cli.main", "tpimpi.cli.process", "tpimpi.cli.follow")
        }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--prompt", "hello"], "--prompt stands in the process list of every host, also of elsewhere"),
        (["--prompt-file", "{prompt}", "--stop", "x"], "--stop stands in the process list of every host"),
    ],
)
def test_a_prompt_in_the_arguments_is_refused_with_other_hosts(
    mpirun: Launcher, cache: dict[str, str], tmp_path: Path, arguments: list[str], line: str
) -> None:
    """The other host is this one under another name: only the name that rank 1 gives differs."""
    program, prompt = tmp_path / "program.py", tmp_path / "prompt.txt"
    prompt.write_text("hello")
    program.write_text(
        "import os, platform, sys\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) != '0':\n"
        "    platform.node = lambda: 'elsewhere'\n"
        "from tpimpi.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    filled = [argument.format(prompt=prompt) for argument in arguments]
    result = mpirun(2, str(program), *filled, env=cache)
    assert result.code == 2
    assert len(result.our_lines) == 1, result.err
    assert line in result.our_lines[0]
    assert "file" in result.our_lines[0]
