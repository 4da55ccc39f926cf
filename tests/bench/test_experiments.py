"""bench/experiments: its data, what it does twice, what it makes of results, and small rows run in earnest."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.experiments import command as experiments
from bench.experiments import results as results_of
from bench.experiments import rows as rows_of
from tests.support.experiments import run
from tests.support.launch import ROOT, TIMEOUT
from tpimpi.errors import InputError
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name

pytestmark = pytest.mark.alone

DATA = """
[settings]
measure = "generate"
program = "tpimpi"
mpi = "openmpi"
shape = "llama-2-7b"
layers = 0
format = "q4_0"
devices = 1
shares = ""
cores = 0.5
memory = ""
read = ""
latency = "2ms"
bandwidth = ""
allreduce = "star"
budget = "fit"
window = ""
context = 256
prompt = 16
tokens = 2
threads = 1

[[rows]]
experiment = "first"
format = ["bf16", "q4_0"]
devices = [1, 2, 4]
quick = { devices = 2 }
smallest = false

[[rows]]
experiment = "second"
memory = "1GiB"
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.toml"
    path.write_text(DATA)
    return path


# The data


def test_lists_are_multiplied_out_and_sizes_differ(data: Path) -> None:
    full = rows_of.read_rows("full", data)
    assert [(row.experiment, row.format, row.devices) for row in full] == [
        *(("first", fmt, devices) for fmt in ("bf16", "q4_0") for devices in (1, 2, 4)),
        ("second", "q4_0", 1),
    ]
    assert full[-1].memory_bytes == 1 << 30
    assert {row.devices for row in rows_of.read_rows("quick", data) if row.experiment == "first"} == {2}
    assert [row.experiment for row in rows_of.read_rows("smallest", data)] == ["second"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tokens = 2\n", "tokens"),
        ('measure = "generate"', "measure is 'dance', must be one of"),
        ('format = "q4_0"', "format is 'dance', must be one of"),
        ('latency = "2ms"', "unknown setting colour"),
    ],
)
def test_wrong_data_is_refused(data: Path, change: str, said: str) -> None:
    key = change.partition(" ")[0]
    new = {"tokens": "tokens = -1\n", "latency": 'latency = "2ms"\ncolour = "red"'}.get(key, f'{key} = "dance"')
    data.write_text(DATA.replace(change, new).replace('format = ["bf16", "q4_0"]\n', ""))
    with pytest.raises(InputError, match=said):
        rows_of.read_rows("full", data)


@pytest.mark.parametrize("size", rows_of.SIZES)
def test_the_experiments_have_the_rows_they_should(size: str) -> None:
    rows = rows_of.read_rows(size)
    wanted = {"emulation", "devices", "memory", "network", "70b", "formats"}
    assert wanted <= {row.experiment for row in rows}
    assert all(row.expected_s > 0 and row.slices is not None for row in rows)
    if size == "full":
        for shape, formats in (("open-llama-3b", 4), ("llama-2-7b", 4), ("llama-2-13b", 2)):
            for experiment, devices in (("devices", {1, 2, 3, 4}), ("eighths", {1, 8})):
                found = [row for row in rows if (row.experiment, row.shape, row.memory) == (experiment, shape, "1GiB")]
                assert len(found) == formats * len(devices) and {row.devices for row in found} == devices


def test_only_chooses_rows_and_refuses_what_no_row_has(data: Path) -> None:
    rows = rows_of.read_rows("full", data)
    chosen = rows_of.choose(rows, ["first"], "format=q4_0 devices=1,4")
    assert [(row.format, row.devices) for row in chosen] == [("q4_0", 1), ("q4_0", 4)]
    for names, only, said in (
        (["third"], "", "no experiment 'third' here; there are first, second"),
        ([], "devices=3", "--only has devices=3; the rows left have 1, 2, 4"),
        ([], "colour=red", "--only has 'colour=red', must be such as"),
    ):
        with pytest.raises(InputError, match=said):
            rows_of.choose(rows, names, only)


@pytest.mark.parametrize("size", rows_of.SIZES)
def test_the_command_beside_a_row_repeats_that_row_alone(size: str) -> None:
    for row in rows_of.read_rows(size):
        options = experiments.parse(["run", *shlex.split(rows_of.repeat(row.settings()))])
        assert rows_of.choose(rows_of.read_rows(options.size), options.names, options.only) == [row]


@pytest.mark.parametrize("size", rows_of.SIZES)
def test_the_command_beside_a_row_of_real_machines_repeats_that_row_there(size: str) -> None:
    launch = "mpirun -np {ranks} --hostfile 'my home.txt'"
    rows = rows_of.on_machines(rows_of.read_rows(size), 8)
    assert {row.devices for row in rows} >= {1, 2 if size == "smallest" else 4}
    for row in rows:
        options = experiments.parse(["run", *shlex.split(rows_of.repeat(row.settings(), launch=launch))])
        chosen = rows_of.choose(rows_of.read_rows(options.size), options.names, options.only)
        assert rows_of.on_machines(chosen, options.ranks) == [row]
        assert (options.launch, options.ranks) == (launch, row.devices)


def test_rows_that_are_gone_have_no_command_and_unknown_launchers_are_left_open() -> None:
    row = rows_of.on_machines(rows_of.choose(rows_of.read_rows(), ["eighths"], "shape=llama-2-13b devices=8"), 8)[0]
    wanted = "eighths --only 'shape=llama-2-13b format=q8_0 devices=8' --launch '…' --ranks 8"
    assert rows_of.repeat(row.settings()) == wanted
    assert rows_of.repeat({**row.settings(), "prompt": 17}) == ""


@pytest.mark.parametrize("devices", [1, 3])
def test_the_bytes_of_a_row_are_those_of_its_slices(data: Path, tmp_path: Path, devices: int) -> None:
    row = replace(
        rows_of.read_rows("full", data)[-1],
        shape="tinyllama-1.1b",
        layers=1,
        devices=devices,
        shares="2,1,1" if devices == 3 else "",
    )
    command = [sys.executable, "-m", "tpimpi", "synth", "--shape", row.shape, "--layers", "1", "--format", row.format]
    command += ["--ranks", str(devices), "--out", str(tmp_path / "slices"), "--quiet"]
    command += ["--shares", row.shares] if row.shares else []
    subprocess.run(command, check=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    found = []
    for rank in range(devices):
        file = SliceFile(tmp_path / "slices" / slice_name(rank, devices))
        found.append(sum(record.nbytes for record in file.records if record.block.kind in ("attn", "mlp", "head")))
        file.close()
    assert row.rank_bytes == tuple(found)
    assert row.model_bytes == sum(found)


def test_a_pass_takes_as_long_as_the_rank_that_has_most(data: Path) -> None:
    row = replace(rows_of.read_rows("full", data)[-1], devices=2, memory="", read="1MB/s", budget="least")
    equal, unlike = (replace(row, shares=shares) for shares in ("", "3,1"))
    assert equal.pass_s == pytest.approx(max(equal.rank_bytes) / 1e6, rel=1e-3)
    # Three quarters of the layers and the head, against a half of them and the head
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 18 / 32
    head = 32000 * 4096 * 34 / 32
    assert unlike.pass_s / equal.pass_s == pytest.approx((0.75 * layers + head) / (0.5 * layers + head), rel=0.01)


# Results


def test_a_result_is_found_again_unless_machine_commit_or_row_differ(data: Path, tmp_path: Path) -> None:
    first, second, *_ = rows_of.read_rows("full", data)
    path = tmp_path / "folder" / "results.jsonl"
    results_of.Results(path).add(first, {"s_per_token": 1.0}, 2.0, "command")
    results_of.Results(path).add(first, {"s_per_token": 3.0}, 2.0, "command")
    kept = results_of.Results(path)
    assert kept.find(first)["figures"] == {"s_per_token": 3.0}
    assert kept.find(second) is None
    for name, other in (("commit", "0123456789"), ("machine", {"cpu": "another"})):
        for line in (lines := [json.loads(line) for line in path.read_text().splitlines()]):
            line[name] = other
        changed = tmp_path / f"{name}.jsonl"
        changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = results_of.Results(changed)
        assert found.find(first) is None
        assert (found.find(first, now=False) is not None) == (name == "commit")
        assert (found.find(first, here=False) is not None) == (name == "machine")
        assert found.find(first, here=False, now=False) is not None


def test_a_commit_with_changes_is_told_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what decides figures; of a commit that is clean, one with two changes in turn, and files without git."""
    monkeypatch.setattr(results_of, "ROOT", tmp_path)
    source, delay = tmp_path / "src" / "a.py", tmp_path / "bench" / "home" / "delay_line.c"
    page = tmp_path / "bench" / "page.py"
    for path in (source, delay, page):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")

    def commit() -> str:
        found: str = results_of.commit.__wrapped__()
        return found

    assert re.fullmatch("files-[0-9a-f]{6}", first := commit())
    delay.write_text("2\n")
    assert re.fullmatch("files-[0-9a-f]{6}", commit()) and commit() != first
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    assert re.fullmatch("[0-9a-f]{10}", clean := commit())
    page.write_text("2\n")  # decides no figure
    assert commit() == clean
    states = []
    for path in (source, delay):
        path.write_text("3\n")
        states.append(commit())
    assert all(re.fullmatch(clean + r"\+[0-9a-f]{6}", state) for state in states) and states[0] != states[1]


@pytest.mark.parametrize(
    "path",
    [
        *("src/tpimpi/star/tuning.py", "CMakeLists.txt", "bench/home/delay_line.c", "bench/home/home.py"),
        *("bench/home/wire.py", "bench/home/sweep.py", "bench/limits/groups.py", "bench/peers/peers.py"),
        *("bench/peers/programs/timed.py", "bench/experiments/runs.py", "bench/experiments/machines.py"),
    ],
)
def test_what_decides_figures_makes_a_commit_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(results_of, "ROOT", tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("1\n")
    before = results_of.commit.__wrapped__()
    (tmp_path / path).write_text("2\n")
    assert results_of.commit.__wrapped__() != before


@pytest.mark.parametrize("cut", [1, 40])
def test_a_result_after_one_that_was_cut_off_is_a_line_of_its_own(data: Path, tmp_path: Path, cut: int) -> None:
    first, second, *_ = rows_of.read_rows("full", data)
    path = tmp_path / "results.jsonl"
    for row in (first, second):
        results_of.Results(path).add(row, {}, 1.0, "command")
    path.write_bytes(path.read_bytes()[:-cut])  # 1: only its end of line is missing
    results = results_of.Results(path)
    assert (results.find(first) is not None, results.find(second) is not None) == (True, cut == 1)
    results.add(second, {"s_per_token": 5.0}, 1.0, "command")
    kept = results_of.Results(path)
    assert kept.find(first) is not None and kept.find(second)["figures"] == {"s_per_token": 5.0}
    assert len(kept.lines) == (3 if cut == 1 else 2)


def test_a_disk_that_is_full_leaves_the_results_as_they_were(data: Path, tmp_path: Path) -> None:
    row = rows_of.read_rows("full", data)[0]
    path = tmp_path / "results.jsonl"
    results_of.Results(path).add(row, {}, 1.0, "command")
    before = path.read_bytes()
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from bench.experiments.results import Results\n"
        "from bench.experiments.rows import read_rows\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 50},) * 2)\n"
        f"Results(Path({str(path)!r})).add(read_rows()[0], {{}}, 1.0, 'command')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert "cannot write" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--results", "/proc/no.jsonl"], "--results /proc/no.jsonl cannot be written: "),
        (["run", "--work", "/proc/no"], "--work /proc/no: "),
        (["list", "--only", 'shape="x'], "--only is 'shape=\"x': No closing quotation"),
        (["run", "--launch", "mpirun -np 2"], "--launch is 'mpirun -np 2', must have {ranks} where"),
        (["run", "--launch", "no-such {ranks}"], "--launch is 'no-such {ranks}', but there is no program no-such"),
        (["run", "--launch", "true {ranks}", "--ranks", "0"], "--ranks is 0, must be 1 or more"),
        (["run", "--ranks", "4"], "--ranks is 4, but there is no --launch"),
        (["page", "devices"], "page takes no names (devices)"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    places = {"--results": tmp_path / "r.jsonl", "--work": tmp_path / "work", "--page": tmp_path / "p.md"}
    given = [text for name, place in places.items() if name not in arguments for text in (name, place)]
    done = run(*arguments, *given)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"experiments: {said}")
    assert not (tmp_path / "r.jsonl").exists() and not (tmp_path / "p.md").exists()


def test_names_may_stand_after_options(tmp_path: Path) -> None:
    listed = run("list", "--results", tmp_path / "r.jsonl", "--smallest", "formats", "70b")
    assert listed.returncode == 0, listed.stderr
    assert {line.partition(":")[0] for line in listed.stdout.splitlines()} == {"70b", "formats"}


def test_a_file_that_is_no_results_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("milk\n")
    done = run("list", "--results", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"experiments: {path}, line 1: is no result; remove it, or give another --results\n"
    assert path.read_text() == "milk\n"
