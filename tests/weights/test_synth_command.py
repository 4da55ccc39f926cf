"""Random weights by command, and runs without a tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.synth_cases import SMALL, Cli, made, write_config
from tpimpi.errors import InputError, ModelError, StorageError
from tpimpi.models.config import ModelConfig
from tpimpi.models.shapes import SHAPES, load_shape
from tpimpi.serving.text.load import tokenizer_of_slices
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.weights.sources import export

# The command


def test_what_is_made_is_said_and_shown(tpimpi: Cli, tmp_path: Path) -> None:
    shape = str(write_config(tmp_path / "toy"))
    out = tmp_path / "slices"
    result = tpimpi("synth", "--shape", shape, "--layers", "1", "--ranks", "3", "--shares", "2,1,1", "--out", str(out))
    assert result.code == 0
    said = f"{out}: rank-0-of-3.h5 to rank-2-of-3.h5 (q4_0, head q8_0, shares 2,1,1)"
    assert result.err.splitlines()[-1] == said
    shown = tpimpi("inspect", str(out), "--verify")
    assert shown.code == 0, shown.err
    words = " ".join(shown.out.split())
    assert "toy-1-layer-rand" in words
    assert words.count("every byte") == 3
    assert words.count("tokenizer") == 1  # of rank 0, which would have one

    result = tpimpi("synth", "--shape", shape, "--as", "gguf", "--out", str(tmp_path / "new" / "model.gguf"))
    assert result.code == 0
    shown = tpimpi("inspect", str(tmp_path / "new" / "model.gguf"), "--verify")
    assert shown.code == 0, shown.err
    for fmt, tensors in (("q4_0", 21), ("q8_0", 2)):
        assert re.search(rf"\b{fmt} \S+ [MG]B in {tensors}\b", shown.out), shown.out


def test_help_names_the_shapes(tpimpi: Cli) -> None:
    result = tpimpi("synth", "--help")
    assert (result.code, result.err) == (0, "")
    words = result.out.split()
    assert {f"{name}," for name in SHAPES} <= set(words)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--shape", "llama-9", "--ranks", "2"],
            "--shape is 'llama-9', must be one of tinyllama-1.1b, open-llama-3b, llama-2-7b, llama-2-13b, llama-2-70b",
        ),
        (["--ranks", "0"], "--ranks is 0, must be 1 to 4096"),
        ([], "--ranks is missing; say how many slices to make, or write the model --as hf or gguf"),
        (["--ranks", "2", "--shares", "1,2,3"], "--shares is '1,2,3', must be 2 numbers with commas between them"),
        (
            ["--ranks", "2", "--format", "auto"],
            "--format is 'auto', must be one of f32, bf16, f16, q8_0, q4_0, q4_1, q6_k",
        ),
        (["--ranks", "2", "--layers", "0"], "--layers is 0, must be 1 to 4096"),
        (["--as", "hf", "--ranks", "2"], "--ranks is for slices; leave it out with --as hf"),
        (["--as", "gguf", "--shares", "2,1"], "--shares is for slices; leave it out with --as gguf"),
        (["--as", "gguf"], "must be the name of a file that ends in .gguf"),
        (["--as", "tar"], "argument --as: invalid choice: 'tar'"),
    ],
)
def test_bad_input_is_said_in_one_line(tpimpi: Cli, tmp_path: Path, arguments: list[str], line: str) -> None:
    given = arguments if "--shape" in arguments else ["--shape", "llama-2-7b", *arguments]
    result = tpimpi("synth", *given, "--out", str(tmp_path / "out"))
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert line in result.err
    assert not (tmp_path / "out").exists()


def test_a_shape_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--shape is .*, must be one of tinyllama-1.1b, .* or the path of a config\.json"
    ):
        load_shape(str(tmp_path))
    with pytest.raises(InputError, match=r"--shape is 'x\\x00y', must be one of"):
        load_shape("x\0y")
    path = write_config(tmp_path, model_type="gpt2")
    with pytest.raises(ModelError, match=r"config\.json: model_type is 'gpt2', which tpimpi does not compute"):
        load_shape(str(path))
    path.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: is no JSON .*; give a model's config\.json"):
        load_shape(str(path), layers=1)
    path.write_text(" " * 2**20 + "{}")
    with pytest.raises(ModelError, match="is longer than 1 MiB"):
        load_shape(str(path))


def config_of(**changes: Any) -> ModelConfig:
    from tpimpi.models.config_hf import config_from_hf

    return config_from_hf({**SMALL, **changes}, "config.json")


def test_what_a_gguf_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    odd = config_of(intermediate_size=100)
    with pytest.raises(InputError, match="rows of 100 numbers, q4_0 in a GGUF file needs a multiple of 32"):
        export.check_gguf(odd, "q4_0", path)
    export.check_gguf(odd, "bf16", path)
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    with pytest.raises(InputError, match="attention windows"):
        export.check_gguf(config_of(model_type="qwen2", **windows), "q4_0", path)
    export.check_gguf(config_of(model_type="mistral", sliding_window=9), "q4_0", path)
    path.mkdir()
    with pytest.raises(InputError, match="is no regular file; give another name"):
        export.check_gguf(config_of(), "q4_0", path)


def test_nobodys_weights_are_written_over(tmp_path: Path) -> None:
    source, out = made(write_config(tmp_path / "shape")), tmp_path / "hf"
    out.mkdir()
    export.write_hf(source, out, lambda done, total: None)
    export.write_hf(source, out, lambda done, total: None)  # our own
    config = out / "config.json"
    values = json.loads(config.read_text())
    del values["_tpimpi_synth"]
    for text in (json.dumps(values), "[]", "1", "{"):
        config.write_text(text)
        with pytest.raises(InputError, match=r"holds 'config\.json' and no config\.json that synth wrote"):
            export.write_hf(source, out, lambda done, total: None)
        assert config.read_text() == text
    config.unlink()
    with pytest.raises(InputError, match=r"holds 'model-00001-of-00001\.safetensors' and no config"):
        export.write_hf(source, out, lambda done, total: None)
    with pytest.raises(InputError, match=r"--out …x+: File name too long; give a shorter path"):
        export.write_hf(source, tmp_path / ("x" * 300), lambda done, total: None)
    with pytest.raises(InputError, match="is no folder"):
        export.write_hf(source, tmp_path / "shape" / "config.json", lambda done, total: None)


@pytest.mark.parametrize("write", [export.write_hf, export.write_gguf])
def test_what_fails_leaves_nothing_behind(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(write_config(tmp_path / "shape"))
    out = tmp_path / "out" / "model.gguf"
    write(source, out, lambda done, total: None)
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, out, stop)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    usage = export.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"disk full: the weights need 0\.00 GB, .* 0\.00 GB free"):
        write(source, out, lambda done, total: None)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("write", [export.write_hf, export.write_gguf])
def test_progress_ends_at_all_there_is(tmp_path: Path, write: Any) -> None:
    steps: list[tuple[int, int]] = []
    write(made(write_config(tmp_path)), tmp_path / "new.gguf", lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert [done == total for done, total in steps] == [False] * (len(steps) - 1) + [True]


# Runs without a tokenizer


def test_token_ids_stand_in_for_a_tokenizer() -> None:
    ids = tokenizer_of_slices({}, 1000)
    assert isinstance(ids, TokenIds)
    assert ids.encode("1 15,29\n  999,, 0") == [1, 15, 29, 999, 0]
    assert ids.encode(" ") == []
    for word in ("1000", "-1", "+1", "1.5", "0x1", "1_0", "hello", "\u0661", "\u00b2", "9" * 5000):
        with pytest.raises(
            InputError, match="is no token id; these slices have no tokenizer, so give whole numbers below 1000"
        ):
            ids.encode(f"1 {word}")
    stream = ids.stream()
    assert [stream.push(7), stream.push(0), stream.push(999), stream.flush()] == ["7", " 0", " 999", ""]
    with pytest.raises(ModelError, match="no tokenizer beside the model"):
        tokenizer_of_slices({"config.json": b"{}"}, 1000)


def test_lines_of_ids_are_answered_with_ids(tpimpi: Cli, synthetic_slices: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--slices", str(synthetic_slices), "--raw", "--max-tokens", "5", "--quiet", "--report", str(report))
    result = tpimpi(*arguments, stdin="1 2 3\nhello\n4,5\n")
    assert result.code == 2
    assert result.err.splitlines() == [
        "tpimpi: 'hello' is no token id; these slices have no tokenizer, so give whole numbers below 160 with blanks or "
        "commas between them"
    ]
    answers = json.loads(report.read_text())["answers"]
    assert len(answers) == 2
    assert result.out == "".join(answer["text"] + "\n" for answer in answers)
    for answer in answers:
        assert len(answer["text"].split()) == 5
        assert all(0 <= int(word) < 160 for word in answer["text"].split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "these slices have no tokenizer (synth made them), so a prompt is token ids; give --raw, and ids such as"),
        (
            ["--raw", "--stop", "5"],
            "these slices have no tokenizer, so there is no text to stop before; leave --stop out",
        ),
    ],
)
def test_wishes_that_need_a_tokenizer_are_refused(
    tpimpi: Cli, synthetic_slices: Path, arguments: list[str], line: str
) -> None:
    result = tpimpi("--slices", str(synthetic_slices), "--prompt", "1 2", *arguments)
    assert (result.code, result.out) == (2, "")
    assert line in result.err


def test_perplexity_of_ids(tpimpi: Cli, synthetic_slices: Path, tmp_path: Path) -> None:
    text, report = tmp_path / "ids.txt", tmp_path / "report.json"
    text.write_text(" ".join(str(number * number % 160) for number in range(200)))
    result = tpimpi(
        "perplexity", str(text), "--slices", str(synthetic_slices), "--context", "50", "--report", str(report)
    )
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert (found["text_tokens"], found["tokens_scored"], found["bos"]) == (200, 196, False)
    assert 100 < found["perplexity"] < 300  # the weights know nothing: about as many as there are tokens


def test_a_model_without_a_tokenizer_is_still_not_sliced(tpimpi: Cli, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "shape"))
    assert tpimpi("synth", "--shape", config, "--as", "hf", "--out", str(tmp_path / "hf")).code == 0
    result = tpimpi("slice", "--model", str(tmp_path / "hf"), "--ranks", "1", "--out", str(tmp_path / "slices"))
    assert result.code == 2
    assert "no tokenizer beside the model" in result.err


def test_a_mix_asked_for_beside_slices_is_what_they_hold(tpimpi: Cli, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "shape", intermediate_size=512))
    for fmt in ("q4_k", "q4_k_m"):
        out = str(tmp_path / fmt)
        assert tpimpi("synth", "--shape", config, "--format", fmt, "--ranks", "1", "--out", out).code == 0
    arguments = ("--raw", "--prompt", "1 2", "--max-tokens", "2", "--quiet", "--format", "q4_k_m", "--slices")
    assert tpimpi(*arguments, str(tmp_path / "q4_k_m")).code == 0
    result = tpimpi(*arguments, str(tmp_path / "q4_k"))
    assert (result.code, result.out) == (2, "")
    said = (
        f"slice file {tmp_path}/q4_k/rank-0-of-1.h5 has format q4_k, head q6_k, --format q4_k_m is q4_k, v q6_k in 1 layer, "
        "down q6_k in 1 layer, head q6_k; leave --format out, or make slices in that format"
    )
    assert said in result.err and len(result.err.splitlines()) == 1
