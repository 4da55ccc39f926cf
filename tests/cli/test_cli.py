"""The program from outside: bad input of every kind, disks that are full, interruptions; and that good input works."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cli_cases import PROMPT, _assert_gone, _with_argument
from tests.support.launch import Launcher, Result, run_command
from tests.support.messages import assert_one_line
from tests.support.ranks import Ranks
from tests.support.tiny_models import write_tiny_hf
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name

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
    place = file._offsets[record.path][0]
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
        "import os, sys, collections\n"
        "os.statvfs = lambda path: collections.namedtuple('Room', 'f_bavail f_frsize')(10**12, 1)\n"
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
    assert [name for name in files if name.endswith(".h5")] == ["rank-0-of-1.h5"]
    assert len(files) == 2, "and that its tokenizer was tried"


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


def test_what_mpich_warns_of_is_no_part_of_the_answer(mpirun: Launcher, cache, tiny: Path) -> None:
    """UCX, over which it talks, writes to standard output."""
    if mpirun.mpi != "mpich":
        pytest.skip("of MPICH")
    env = {**cache, "TPIMPI_MODEL": str(tiny), "UCX_NONSENSE": "1"}
    result = mpirun(2, "-m", "tpimpi", *PROMPT, "--max-tokens", "2", "--quiet", env=env)
    assert result.code == 0 and "UCX" not in result.out, result.out
    assert "unused environment variable: UCX_NONSENSE" in result.err, "or it warns of nothing"


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


@pytest.mark.slow
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


@pytest.mark.alone  # the launcher kills its ranks half a second later, whatever they have yet to say
def test_ctrl_c_keeps_the_text_and_ends_every_rank(mpirun: Launcher, cache, smollm2: Path, tmp_path: Path) -> None:
    """The launcher gets what Ctrl-C sends while the answer is on its way."""
    mark = f"--seed={time.time_ns()}"
    arguments = ["-m", "tpimpi", "--prompt", "Tell me a long story.", "--max-tokens", "2000", "--ignore-eos", mark]
    arguments += ["--session", str(tmp_path / "s")]
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
        assert f"the conversation is kept in {tmp_path}/s; the same --session goes on with it".encode() in err
        assert re.search(rb"[a-z]{3,} [a-z]{2,}", text + rest), "the text so far does not stand"
        _assert_gone(mark)
    finally:
        for pid in _with_argument(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    no_pieces = list(range(pieces.vocab_size(), 420))  # rows of the table that stand for nothing are never chosen
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": no_pieces}
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=24, **options)[0, ids.shape[1] :]
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
    assert found["text"].strip() == pieces.decode(made.tolist()).strip()
