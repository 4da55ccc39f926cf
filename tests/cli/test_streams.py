"""Streams, terminals, and what else surrounds a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cli_cases import PROMPT, _assert_gone, slicing
from tests.support.launch import Launcher, run_command
from tests.support.messages import assert_one_line
from tests.support.ranks import Ranks
from tests.support.terminal import terminal
from tpimpi.system.launcher import all_on_this_host, launched_size


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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_one_line(tpimpi, tiny: Path, cache, unbuffered: str) -> None:
    command = f"{sys.executable} -m tpimpi --prompt fox --max-tokens 3 >/dev/full"
    env = {**cache, "TPIMPI_MODEL": str(tiny), "PYTHONUNBUFFERED": unbuffered}
    result = run_command(["bash", "-c", command], env=env, timeout=60)
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


@pytest.mark.slow_but("h5py")
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


@pytest.mark.parametrize(
    ("variables", "here"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}, True),
        # hydra, from a shell that another launcher started on one host
        ({"PMI_SIZE": "3", "MPI_LOCALNRANKS": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, False),
        ({"PMI_SIZE": "3"}, None),
    ],
)
def test_where_variables_of_launchers_disagree_a_rank_is_on_another_host(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], here: bool | None
) -> None:
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI_", "PALS_", "SLURM_", "MPI_LOCAL"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert all_on_this_host() is here


def test_at_a_terminal_it_shows_a_prompt_streams_and_ends_with_ctrl_d(mpirun: Launcher, cache, smollm2: Path) -> None:
    """One that cannot move a cursor; test_terminal.py has those that can."""
    command = mpirun.command(2, ["-m", "tpimpi", "--max-tokens", "30", "--raw", "--ignore-eos"])
    with terminal(command, {**mpirun.env, **cache, "TERM": "dumb"}) as at:
        at.until("> ", timeout=120)
        before = at.pieces
        at.type("One, two, three,\n")
        answer = at.until("\n> ", timeout=120)
        assert at.pieces - before > 8, f"the answer did not stream: {answer!r}"
        at.type("\x04")
        assert at.end()[0] == 0


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
    keys = ("model", "format", "backend", "allreduce", "load_s", "token_ids", "prompt_tokens", "ranks")
    earlier.write_text(json.dumps(dict.fromkeys(keys), indent=1))  # as the first version wrote it
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
