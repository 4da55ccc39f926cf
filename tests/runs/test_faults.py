"""What happens to a slice file, or to the disk under it, while a run reads from it: an error that names it, or a wait; never
a wrong answer. Every fault here is a real one, and every run a program of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import h5py
import pytest

from bench import limits
from tests.support.launch import TIMEOUT, Launcher, Result, run_command
from tpimpi.system.units import parse_size

# 82 MB in q8_0: enough that a token takes a while where it is streamed.
SHAPE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MANY = 200  # tokens; more than are made before a fault is noticed
SOME = 24
PROMPT = ("--raw", "--prompt", "1 2 3", "--ignore-eos", "--context", "256", "--quiet")
SAMPLING = ("--temperature", "1", "--seed", "7")  # so that the text tells where the smallest thing differs
BEFORE = 3  # tokens that are there when a fault comes
MB = 1_000_000
RANKS = [1, pytest.param(2, marks=pytest.mark.mpi)]
TILE = r"(layers/\d{4}/(attn|mlp)/tile-\d{3}|head/tile-\d{3}|the embedding|a row of the embedding)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the disk for large files, which are not kept after the tests as pytest's own are."""
    path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def slices(folder: Path) -> Callable[..., Path]:
    """Makes slices for so many ranks, of a model that a seed tells, once."""
    (folder / "config.json").write_text(json.dumps(SHAPE))

    def make(ranks: int, seed: int = 0) -> Path:
        out = folder / f"{ranks}-{seed}"
        if not out.exists():
            options = ("--format", "q8_0", "--ranks", str(ranks), "--seed", str(seed), "--quiet", "--out", str(out))
            done = run_command(
                [sys.executable, "-m", "tpimpi", "synth", "--shape", str(folder / "config.json"), *options], env={}
            )
            assert done.code == 0, done.err
        return out

    return make


@pytest.fixture
def copies(folder: Path, slices: Callable[..., Path]) -> Iterator[Callable[[int], Path]]:
    """A copy of the slices that a test may spoil."""
    made: list[Path] = []

    def copy(ranks: int) -> Path:
        made.append(Path(tempfile.mkdtemp(dir=folder)))
        for path in slices(ranks).iterdir():
            shutil.copy(path, made[-1])
        return made[-1]

    yield copy
    for path in made:
        shutil.rmtree(path)


class Running:
    """A run whose output is read as it comes."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._deadline = time.monotonic() + TIMEOUT
        self._found = [bytearray(), bytearray()]
        streams = (self.process.stdout, self.process.stderr)
        self._threads = [
            threading.Thread(target=self._gather, args=pair, daemon=True)
            for pair in zip(streams, self._found, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _gather(self, stream: IO[bytes], into: bytearray) -> None:
        while data := os.read(stream.fileno(), 1 << 16):
            into += data

    @property
    def texts(self) -> list[str]:
        """Standard output and standard error, as far as they have come."""
        return [bytes(found).decode(errors="replace") for found in self._found]

    def wait_until(self, what: str, reached: Callable[[str, str], bool]) -> None:
        while not reached(*self.texts):
            out, err = self.texts
            if self.process.poll() is not None or time.monotonic() > self._deadline:
                pytest.fail(f"no {what}; exit code {self.process.poll()}\nstdout: {out}\nstderr: {err}")
            time.sleep(0.005)

    def finish(self, timeout: float = TIMEOUT) -> Result:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end\nstdout: {self.texts[0]}\nstderr: {self.texts[1]}")
        for thread in self._threads:
            thread.join()
        return Result(code, *self.texts)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for thread, stream in zip(self._threads, (self.process.stdout, self.process.stderr), strict=True):
            thread.join()
            if stream is not None:
                stream.close()


class Runs:
    """Runs of the model on one number of ranks."""

    def __init__(self, launcher: Launcher | None, ranks: int, slices: Path) -> None:
        self._launcher, self.ranks, self.slices = launcher, ranks, slices
        self.victim = ranks - 1  # the rank whose file the faults befall: not the one that prints
        self._least: int | None = None
        self._text: list[str] | None = None
        self._running: list[Running] = []

    def command(self, *options: str, slices: Path | None = None, tokens: int = SOME) -> list[str]:
        arguments = ["-m", "tpimpi", "--slices", str(slices or self.slices), *PROMPT, *SAMPLING]
        arguments += ["--max-tokens", str(tokens), *options]
        return [sys.executable, *arguments] if self._launcher is None else self._launcher.command(self.ranks, arguments)

    @property
    def env(self) -> dict[str, str]:
        return {"TPIMPI_MODEL": "", **(self._launcher.env if self._launcher else {})}

    def run(self, *options: str, slices: Path | None = None, tokens: int = SOME) -> Result:
        return run_command(self.command(*options, slices=slices, tokens=tokens), env=self.env)

    def start(self, command: Sequence[str]) -> Running:
        """Begin a run; it is going on when this returns."""
        running = Running(command, self.env)
        self._running.append(running)
        running.wait_until("tokens", lambda out, err: out.count(" ") >= BEFORE)
        return running

    def end(self) -> None:
        for running in self._running:
            running.kill()
        self._running.clear()

    @property
    def least(self) -> int:
        """The smallest --memory that a run says works, in MB."""
        if self._least is None:
            result = self.run("--memory", "1M")
            match = re.search(r"this rank needs at least (\d+) MB", result.err)
            assert match, result.err
            self._least = int(match[1])
        return self._least

    @property
    def little(self) -> tuple[str, str]:
        """--memory at about the smallest that works, so that nearly everything is streamed for each token."""
        return "--memory", f"{self.least + 2}M"

    @property
    def text(self) -> list[str]:
        """The tokens of a run to which nothing happens."""
        if self._text is None:
            result = self.run(tokens=MANY)
            assert result.code == 0, result.err
            self._text = result.out.split()
            assert len(self._text) == MANY and len(set(self._text)) > MANY // 4, "it would not tell a wrong answer"
        return self._text

    def slice_of_victim(self, folder: Path) -> Path:
        return folder / f"rank-{self.victim}-of-{self.ranks}.h5"

    @property
    def who(self) -> str:
        """How the victim's line begins."""
        return "tpimpi: " if self.ranks == 1 else rf"r{self.victim} \S+: "

    def check_ended(self, result: Result, line: str) -> None:
        """It ended with one line of ours, of this pattern, and printed nothing that is wrong."""
        assert result.code != 0
        assert len(result.our_lines) == 1, result.err
        assert re.fullmatch(self.who + line, result.our_lines[0]), result.our_lines[0]
        tokens = result.out.split()
        assert BEFORE <= len(tokens) < MANY
        assert tokens == self.text[: len(tokens)]


@pytest.fixture(scope="module")
def all_runs(slices: Callable[..., Path]) -> dict[int, Runs]:
    """By the number of ranks; so that what they know is found out once."""
    return {}


@pytest.fixture
def runs(request: pytest.FixtureRequest, all_runs: dict[int, Runs], slices: Callable[..., Path]) -> Iterator[Runs]:
    """Of one rank without a launcher, or of two under mpirun; what still runs at the end is killed."""
    ranks: int = request.param
    if ranks not in all_runs:
        launcher = request.getfixturevalue("mpirun") if ranks > 1 else None
        all_runs[ranks] = Runs(launcher, ranks, slices(ranks))
    yield all_runs[ranks]
    all_runs[ranks].end()


on_one_and_two_ranks = pytest.mark.parametrize("runs", RANKS, indirect=True)
on_one_rank = pytest.mark.parametrize("runs", [1], indirect=True)
on_two_ranks = pytest.mark.parametrize("runs", RANKS[1:], indirect=True)


# The file


@on_one_and_two_ranks
@pytest.mark.parametrize("part", [0, 0.5])
@pytest.mark.slow_but("0.5-2")
def test_a_slice_that_shrinks(runs: Runs, copies: Callable[[int], Path], part: float) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    running = runs.start(runs.command(*runs.little, slices=folder, tokens=MANY))
    os.truncate(path, int(path.stat().st_size * part))
    line = rf"slice file {path} was changed while this run was using it: {TILE} is no longer what it was; .*"
    runs.check_ended(running.finish(), line)


@on_one_and_two_ranks
@pytest.mark.parametrize("by", ["noise", "another model's slice"])
@pytest.mark.slow
def test_a_slice_that_is_written_over(runs: Runs, copies, slices, by: str) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    size = path.stat().st_size
    other = os.urandom(size) if by == "noise" else runs.slice_of_victim(slices(runs.ranks, seed=1)).read_bytes()
    assert len(other) == size
    running = runs.start(runs.command(*runs.little, slices=folder, tokens=MANY))
    with path.open("r+b") as file:
        file.write(other)
    line = rf"slice file {path} was changed while this run was using it: {TILE} is no longer what it was; .*"
    runs.check_ended(running.finish(), line)


@on_one_rank
@pytest.mark.slow
def test_a_slice_that_is_written_over_while_all_tiles_are_pinned(runs: Runs, copies, slices) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    other = runs.slice_of_victim(slices(runs.ranks, seed=1)).read_bytes()
    running = runs.start(runs.command("--memory", "2G", slices=folder, tokens=MANY))
    with path.open("r+b") as file:
        file.write(other)
    result = running.finish()
    tokens = result.out.split()
    assert tokens == runs.text[: len(tokens)], "only rows of the embedding are still read, and they are another model's"
    assert result.code != 0 or len(tokens) == MANY, result.err


@on_one_and_two_ranks
@pytest.mark.parametrize("how", ["replaced", "removed"])
@pytest.mark.slow_but("removed-2")
def test_a_slice_that_is_replaced_is_used_to_the_end(runs: Runs, copies, slices, how: str) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    new = folder / "new"
    shutil.copy(runs.slice_of_victim(slices(runs.ranks, seed=1)), new)
    running = runs.start(runs.command(*runs.little, slices=folder))
    if how == "replaced":
        new.replace(path)
    else:
        path.unlink()
    result = running.finish()
    assert (result.code, result.our_lines) == (0, []), result.err
    assert result.out.split() == runs.text[:SOME]


# Slices that another tool has packed, which h5py reads


@pytest.fixture(scope="module")
def packed(folder: Path, slices: Callable[..., Path]) -> Path:
    """The slice of one rank with every dataset compressed."""
    out = folder / "packed"
    out.mkdir()
    (path,) = slices(1).iterdir()
    with h5py.File(path) as old, h5py.File(out / path.name, "w") as new:

        def copy(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[...], compression="lzf")

        old.visititems(copy)
    return out


@on_one_rank
@pytest.mark.parametrize(
    "fault",
    ["truncated", "written over", "replaced"],
)
@pytest.mark.slow
def test_packed_slices_under_a_fault(runs: Runs, packed: Path, tmp_path: Path, fault: str) -> None:
    path = tmp_path / runs.slice_of_victim(packed).name
    shutil.copy(runs.slice_of_victim(packed), path)
    tokens = 10 if fault == "replaced" else MANY
    running = runs.start(runs.command("--memory", f"{runs.least + 20}M", slices=tmp_path, tokens=tokens))
    if fault == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif fault == "written over":
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size))
    else:
        path.unlink()
    result = running.finish(30)
    path.unlink(missing_ok=True)
    if fault == "replaced":
        assert (result.code, result.our_lines) == (0, []), result.err
        assert result.out.split() == runs.text[:tokens]
    else:
        what = rf"({TILE}|layers/\d{{4}}/\w+/tile-\d{{3}}/\w+|head/tile-\d{{3}}/rows|embedding)"
        runs.check_ended(result, rf"slice file {path} was changed while this run was using it: {what} is no .*")


@on_one_rank
@pytest.mark.parametrize("kind", ["as written", "packed"])
@pytest.mark.slow_but("as written-1")
def test_a_run_whose_reader_goes_away_ends(runs: Runs, packed: Path, kind: str) -> None:
    slices = runs.slices if kind == "as written" else packed
    command = runs.command("--memory", f"{runs.least + 20}M", slices=slices, tokens=MANY)
    result = run_command(["sh", "-c", '{ "$@"; echo "code $?" >&2; } | head -c 20', "sh", *command], env={}, timeout=30)
    assert (result.err, len(result.out)) == ("code 1\n", 20)


# The disk


def _call(*command: str) -> str:
    """Run a command of the system; skips the test where it cannot be had."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def failing_disk(folder: Path) -> Iterator[Callable[[Path], tuple[Path, Callable[[], None]]]]:
    """Puts a file on a disk of its own: gives its path there, and what makes every read of it fail."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    with contextlib.ExitStack() as stack:

        def put(file: Path) -> tuple[Path, Callable[[], None]]:
            place = Path(tempfile.mkdtemp(dir=folder))
            stack.callback(shutil.rmtree, place)
            image, mounted = place / "image", place / "mounted"
            mounted.mkdir()
            with image.open("wb") as disk:
                disk.truncate(file.stat().st_size + (64 << 20))
            _call("mkfs.ext4", "-q", "-F", str(image))
            device = _call("losetup", "--find", "--show", str(image))
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=False, timeout=60)
            _call("mount", "-t", "ext4", device, str(mounted))
            try:
                shutil.copy(file, mounted)
            finally:
                subprocess.run(["umount", str(mounted)], check=True, timeout=60)
            # Read-only, so that nothing has to be written when it is unmounted.
            _call("mount", "-t", "ext4", "-o", "ro", device, str(mounted))
            # Lazily, should something still have the file open, so that the device goes in any case.
            stack.callback(subprocess.run, ["umount", "--lazy", str(mounted)], check=False, timeout=60)
            return mounted / file.name, lambda: os.truncate(image, 1 << 20)

        yield put


@on_one_and_two_ranks
@pytest.mark.slow_but("1")
def test_a_disk_that_fails(runs: Runs, copies, failing_disk) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    there, fail = failing_disk(path)
    path.unlink()
    path.symlink_to(there)
    running = runs.start(runs.command(*runs.little, slices=folder, tokens=MANY))
    fail()
    result = running.finish()
    runs.check_ended(
        result, rf"slice file {path} can no longer be read at {TILE}: Input/output error; check the disk .*"
    )
    runs.end()


@on_one_and_two_ranks
@pytest.mark.slow
def test_a_disk_that_stalls_is_waited_for(runs: Runs) -> None:
    if reason := limits.available("io"):
        pytest.skip(reason)
    try:
        group = limits.Group(f"tpimpi-test-stall-{os.getpid()}", device=runs.slices)
    except limits.LimitError as error:
        pytest.skip(str(error))
    with group:
        running = runs.start(group.command(runs.command(*runs.little)))
        group.set_read_bps(1024)
        running.wait_until("word of the stall", lambda out, err: "waiting for the disk" in err)
        time.sleep(3)
        group.set_read_bps(None)
        result = running.finish()
    assert result.code == 0, result.err
    assert result.out.split() == runs.text[:SOME]
    who = "tpimpi" if runs.ranks == 1 else r"r[01] \S+"
    stalled = [line for line in result.our_lines if "waiting for" in line]
    assert 1 <= len(stalled) <= runs.ranks, "none is told twice in eight seconds"
    for line in stalled:
        where = rf"{runs.slices}/rank-\d-of-{runs.ranks}\.h5"
        assert re.fullmatch(
            rf"{who}: waiting for the disk for [5-7] s, for {TILE}: slow, not gone \({where}\)", line
        ), line
    goes_on = [line for line in result.our_lines if "the disk goes on" in line]
    assert len(goes_on) == len(stalled) and len(result.our_lines) == 2 * len(stalled), result.err


# Memory that is not enough


@on_one_and_two_ranks
def test_less_memory_than_works_is_refused(runs: Runs) -> None:
    for size in ("1M", f"{runs.least - 10}M"):
        result = runs.run("--memory", size)
        assert (result.code, result.out) == (2, ""), result.err
        assert len(result.our_lines) == 1, result.err
        who = "tpimpi" if runs.ranks == 1 else r"r0 \S+"
        mb = size.removesuffix("M")
        line = rf"{who}: --memory is {mb} MB, this rank needs at least (\d+) MB \(.*"
        match = re.fullmatch(line, result.our_lines[0])
        assert match, result.our_lines[0]
        assert abs(int(match[1]) - runs.least) <= 4  # the program itself is not always as large


def _check_kept(runs: Runs, memory: str, report: Path) -> list[dict[str, Any]]:
    """A run with this --memory gives the text and keeps the promise; what each rank reports."""
    result = runs.run("--memory", memory, "--report", str(report))
    assert (result.code, result.our_lines) == (0, []), result.err
    assert result.out.split() == runs.text[:SOME]
    ranks: list[dict[str, Any]] = json.loads(report.read_text())["ranks"]
    for rank in ranks:
        assert rank["memory_bytes"] == parse_size(memory, "--memory")
        assert rank["peak_rss_bytes"] <= rank["memory_bytes"]
        assert max(point[1] for point in rank["timeline"]) <= rank["peak_rss_bytes"] + 4 * MB  # counters are not exact
        assert rank["timeline"] == sorted(rank["timeline"])
    return ranks


@on_one_and_two_ranks
def test_the_smallest_that_is_named_works(runs: Runs, tmp_path: Path) -> None:
    _check_kept(runs, f"{runs.least} MB", tmp_path / "report")  # as it is written in the message


@on_one_and_two_ranks
@pytest.mark.slow
def test_about_the_smallest_works(runs: Runs, tmp_path: Path) -> None:
    for rank in _check_kept(runs, runs.little[1], tmp_path / "report"):
        assert rank["bytes_read"] >= SOME * rank["streamed_bytes_per_token"] > 0


@on_one_rank
@pytest.mark.parametrize("more", [7, 20, 45, 500])
@pytest.mark.slow_but("45-1")
def test_the_text_is_the_same_with_any_memory(runs: Runs, more: int, tmp_path: Path) -> None:
    (rank,) = _check_kept(runs, f"{runs.least + more}M", tmp_path / "report")
    streamed = rank["streamed_bytes_per_token"]
    assert (streamed == 0) == (more == 500)
    assert SOME * streamed <= rank["bytes_read"] - rank["pinned_bytes"] <= (SOME + 1) * streamed


@on_two_ranks
@pytest.mark.slow
def test_a_size_for_each_rank(runs: Runs) -> None:
    result = runs.run("--memory", f"{runs.least + 10}M,{runs.least + 30}M")
    assert result.code == 0 and result.out.split() == runs.text[:SOME], result.err
    result = runs.run("--memory", f"{runs.least + 10}M,3M")
    assert (result.code, result.out, len(result.our_lines)) == (2, "", 1), result.err
    assert re.match(r"r1 \S+: --memory is 3 MB, this rank needs at least \d+ MB ", result.our_lines[0])


@on_two_ranks
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--memory", "1G,1G,1G"], "--memory has 3 sizes, this run has 2 ranks; "),
        (["--memory", "1G,"], "--memory is '1G,', must be auto, or one size, or a size for each rank"),
        (["--memory", "1G,auto"], "--memory is '1G,auto', must be auto, or one size, or a size for each rank"),
        (["--memory", "1G", "--window", "2"], "--window 2 and --memory 1G are both given; "),
        (["--memory", "auto", "--window", "all"], "--window all and --memory auto are both given; "),
    ],
)
def test_memory_that_makes_no_sense_is_one_line(runs: Runs, options: list[str], line: str) -> None:
    result = runs.run(*options)
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.our_lines) == 1 and line in result.our_lines[0], result.err


@on_one_rank
@pytest.mark.parametrize("size", ["", "0", "-1G", "1e9", "700", "x" * 5000, "1G,1G"])
def test_no_size_is_one_line(runs: Runs, size: str) -> None:
    result = runs.run(f"--memory={size}")
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.err.splitlines()) == 1 and len(result.err) < 300
    assert result.err.startswith("tpimpi: --memory ")
