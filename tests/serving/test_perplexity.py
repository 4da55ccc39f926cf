"""Perplexity and KL divergence: the arithmetic against torch, the command against transformers' logits."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.launch import PROGRAMS, Launcher, Result, run_command
from tests.support.ranks import Ranks
from tpimpi.serving.perplexity import (
    Divergence,
    Score,
    cut,
    cut_whole,
    kl_divergences,
    log_normalizers,
    mean_and_error,
    negative_log_likelihoods,
)
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.weights.sources import open_source

TEXT = "the lazy fox jumps over the quick brown dog, and the dog is quick to jump over the lazy brown fox. " * 6
CONTEXT = 48


# The arithmetic


@given(st.integers(0, 60), st.integers(2, 20), st.booleans())
def test_chunks_hold_the_text_in_order(count: int, context: int, with_bos: bool) -> None:
    ids = list(range(100, 100 + count))
    chunks = cut(ids, context, 1 if with_bos else None)
    assert all(2 <= len(chunk) <= context for chunk in chunks)
    assert all(len(chunk) == context for chunk in chunks[:-1])
    if with_bos:
        assert all(chunk[0] == 1 for chunk in chunks)
        assert [token for chunk in chunks for token in chunk[1:]] == ids
    else:
        left_out = count % context == 1  # a single id at the end predicts nothing
        assert [token for chunk in chunks for token in chunk] == ids[: count - left_out]


@given(st.integers(0, 60), st.integers(2, 20), st.booleans())
def test_whole_chunks_have_bos_in_the_place_of_a_token(count: int, context: int, with_bos: bool) -> None:
    ids = list(range(100, 100 + count))
    chunks = cut_whole(ids, context, 1 if with_bos else None)
    text = [1, *ids] if with_bos else ids
    assert len(chunks) == len(text) // context
    for index, chunk in enumerate(chunks):
        assert len(chunk) == context
        assert chunk[0] == (1 if with_bos else text[index * context])
        assert chunk[1:] == text[index * context + 1 : (index + 1) * context]


def random_logits(seed: int, positions: int, vocab: int, scale: float) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((positions, vocab)) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0, 3e4])
@pytest.mark.parametrize("positions", [1, 8, 21])
def test_likelihood_and_divergence_are_torchs(positions: int, scale: float) -> None:
    import torch
    from torch.nn import functional

    p, q = random_logits(0, positions, 301, scale), random_logits(1, positions, 301, scale)
    targets = np.random.default_rng(2).integers(0, 301, positions).tolist()
    wide_p, wide_q = (torch.from_numpy(x.astype(np.float64)) for x in (p, q))
    expected = functional.cross_entropy(wide_q, torch.tensor(targets), reduction="none").numpy()
    found = negative_log_likelihoods(q, log_normalizers(q), targets)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    expected = functional.kl_div(wide_q.log_softmax(1), wide_p.log_softmax(1), reduction="none", log_target=True).sum(1)
    found = kl_divergences(p, log_normalizers(p), q, log_normalizers(q))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_a_distribution_does_not_diverge_from_itself_nor_from_its_shifted_logits() -> None:
    logits = np.round(random_logits(3, 9, 200, 5.0) * 4096) / np.float32(4096)
    shifted = logits + np.float32(3)  # exact
    normalizers = log_normalizers(logits)
    assert (kl_divergences(logits, normalizers, logits, normalizers) == 0).all()
    np.testing.assert_allclose(kl_divergences(logits, normalizers, shifted, log_normalizers(shifted)), 0, atol=1e-14)


def test_small_divergences_are_not_lost_in_rounding() -> None:
    """To second order KL is half the variance of the difference of the logits under P."""
    logits = random_logits(4, 1, 500, 2.0)
    change = random_logits(5, 1, 500, 1.0) * np.float32(2e-4)
    other = logits + change
    p = np.exp(logits.astype(np.float64) - log_normalizers(logits)[:, None])
    difference = other.astype(np.float64) - logits
    expected = ((p * difference**2).sum() - (p * difference).sum() ** 2) / 2
    found = kl_divergences(logits, log_normalizers(logits), other, log_normalizers(other))[0]
    assert 1e-9 < expected < 1e-7
    assert found == pytest.approx(expected, rel=1e-3)


def test_means_and_their_errors() -> None:
    values = np.array([1.0, 2.0, 4.0])
    assert mean_and_error(values) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3) / math.sqrt(3)))
    assert mean_and_error(np.array([5.0])) == (5.0, 0.0)
    score = Score.of("f32", values, 2.0)
    assert score.perplexity == pytest.approx(math.exp(7 / 3))
    assert score.perplexity_se == pytest.approx(math.exp(7 / 3) * math.sqrt(7 / 3) / math.sqrt(3))
    assert score.tokens_per_s == 1.5
    found = Divergence.of(np.array([0.0, 0.5, 0.25]), np.array([True, False, True]))
    assert (found.kl_mean, found.kl_max, found.same_top) == (0.25, 0.5, pytest.approx(2 / 3))


# The command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def with_bos(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a tokenizer that begins every text with BOS."""
    path = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("bos") / "with-bos"))
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": True}))
    return path


def ids_of(model: Path) -> list[int]:
    with open_source(model) as source:
        return load_tokenizer(source.tokenizer_assets(), source.config.vocab).encode(TEXT, special=False)


def measure(tpimpi: Callable[..., Result], tmp_path: Path, text: Path, *arguments: str) -> dict[str, object]:
    report = tmp_path / "report.json"
    result = tpimpi(
        *("perplexity", str(text), "--context", str(CONTEXT), "--backend", "torch", "--threads", "1"),
        *("--report", str(report), *arguments),
    )
    assert result.code == 0, result.err
    found: dict[str, object] = json.loads(report.read_text())
    return found


@pytest.mark.parametrize("model", ["tiny", "with_bos"])
def test_perplexity_is_that_of_transformers_logits(
    tpimpi: Callable[..., Result], request: pytest.FixtureRequest, text: Path, tmp_path: Path, model: str
) -> None:
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    path = request.getfixturevalue(model)
    bos = [1] if model == "with_bos" else []
    ids, room = ids_of(path), CONTEXT - len(bos)
    assert len(ids) % room > 1, "the last chunk should be a shorter one"
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    losses = []
    for start in range(0, len(ids), room):
        chunk = torch.tensor([bos + ids[start : start + room]])
        with torch.no_grad():
            logits = reference(chunk).logits[0, :-1].double()
        losses.append(functional.cross_entropy(logits, chunk[0, 1:], reduction="none"))
    nll = torch.cat(losses).numpy()
    found = measure(tpimpi, tmp_path, text, "--model", str(path), "--format", "f32")
    assert found["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found["perplexity_se"] == pytest.approx(
        math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(nll.size), rel=1e-4
    )
    assert found["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert (found["tokens_scored"], found["text_tokens"], found["chunks"]) == (nll.size, len(ids), len(losses))
    assert (found["context"], found["bos"], found["format"]) == (CONTEXT, bool(bos), "f32")
    assert found["against"] is None
    assert found["tokens_per_s"] == pytest.approx(nll.size / found["seconds"])


def test_second_halves_are_scored_as_llama_cpp_does(
    tpimpi: Callable[..., Result], with_bos: Path, text: Path, tmp_path: Path
) -> None:
    """Its tools/perplexity: chunk i has tokens [i * n, (i + 1) * n) of the text with BOS, the first made BOS; the logits
    at positions n / 2 to n - 2 are asked for the token after each."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    tokens, context = [1, *ids_of(with_bos)], CONTEXT + 1  # an odd one
    assert len(tokens) // context > 1 and len(tokens) % context
    reference = AutoModelForCausalLM.from_pretrained(with_bos, dtype=torch.float32)
    losses = []
    for start in range(0, len(tokens) // context * context, context):
        chunk = torch.tensor([[1, *tokens[start + 1 : start + context]]])
        with torch.no_grad():
            logits = reference(chunk).logits[0, context // 2 : -1].double()
        losses.append(functional.cross_entropy(logits, chunk[0, context // 2 + 1 :], reduction="none"))
    nll = torch.cat(losses).numpy()
    arguments = ("--model", str(with_bos), "--format", "f32", "--second-half", "--context", str(context))
    found = measure(tpimpi, tmp_path, text, *arguments, "--against", "f32")
    assert found["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert (found["tokens_scored"], found["chunks"], found["second_half"]) == (nll.size, len(losses), True)
    assert found["against"]["kl_mean"] == 0


def logits_of(model: Path, fmt: str, tpimpi: Callable[..., Result], folder: Path) -> np.ndarray:
    """Logits of every position of TEXT, chunk by chunk, through the program that tests logits: [tokens, vocab]."""
    slices = folder / fmt
    made = tpimpi("slice", "--model", str(model), "--ranks", "1", "--format", fmt, "--out", str(slices), "--quiet")
    assert made.code == 0, made.err
    ids = ids_of(model)
    chunks = [ids[start : start + CONTEXT] for start in range(0, len(ids), CONTEXT)]
    jobs = [
        {"name": f"{fmt}-{index}", "slices": str(slices), "ids": chunk[:-1], "chunks": [len(chunk) - 1]}
        for index, chunk in enumerate(chunks)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = run_command([sys.executable, str(PROGRAMS / "logits.py"), str(folder / "jobs.json"), str(folder)], env={})
    assert result.code == 0, result.err
    return np.concatenate([np.load(folder / f"{job['name']}.npy") for job in jobs])


@pytest.mark.slow
def test_divergence_is_what_torch_computes_from_both_logits(
    tpimpi: Callable[..., Result], tiny: Path, text: Path, tmp_path: Path
) -> None:
    import torch
    from torch.nn import functional

    q, p = (logits_of(tiny, fmt, tpimpi, tmp_path) for fmt in ("bf16", "f32"))
    log_q, log_p = (torch.from_numpy(x).double().log_softmax(1) for x in (q, p))
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).numpy()
    found = measure(tpimpi, tmp_path, text, "--model", str(tiny), "--format", "bf16", "--against", "f32")
    against = found["against"]
    assert (found["format"], against["format"]) == ("bf16", "f32")
    assert kl.mean() > 1e-7, "nothing was rounded: the test shows nothing"
    assert against["kl_mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert against["kl_se"] == pytest.approx(kl.std(ddof=1) / math.sqrt(kl.size), rel=1e-5)
    assert against["kl_max"] == pytest.approx(kl.max(), rel=1e-5)
    assert against["same_top"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    plain = measure(tpimpi, tmp_path, text, "--model", str(tiny), "--format", "f32")
    assert against["perplexity"] == plain["perplexity"] != found["perplexity"]


def test_a_format_does_not_diverge_from_itself(
    tpimpi: Callable[..., Result], tiny: Path, text: Path, tmp_path: Path
) -> None:
    found = measure(tpimpi, tmp_path, text, "--model", str(tiny), "--format", "f32", "--against", "f32")
    against = found["against"]
    assert (against["kl_mean"], against["kl_se"], against["kl_max"], against["same_top"]) == (0, 0, 0, 1)
    assert against["perplexity"] == found["perplexity"]


@pytest.mark.slow
def test_the_window_changes_nothing(tpimpi: Callable[..., Result], tiny: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(tiny), "--format", "bf16", "--against", "f32")
    found = [measure(tpimpi, tmp_path, text, *arguments, "--window", window) for window in ("all", "2")]
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert found[0]["against"]["kl_mean"] == found[1]["against"]["kl_mean"]


def test_ranks_follow_two_models_in_turn(
    on_ranks: Ranks, tpimpi: Callable[..., Result], cache: dict[str, str], tiny: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ("--model", str(tiny), "--format", "bf16", "--against", "f32")
    alone = measure(tpimpi, tmp_path, text, *arguments)
    report = tmp_path / "three.json"
    result = on_ranks(
        3,
        *("-m", "tpimpi", "perplexity", str(text), "--context", str(CONTEXT), "--backend", "torch", "--threads", "1"),
        *("--report", str(report), *arguments),
        env=cache,
    )
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert found["against"]["perplexity"] == pytest.approx(alone["against"]["perplexity"], rel=1e-5)
    assert found["against"]["kl_mean"] == pytest.approx(alone["against"]["kl_mean"], rel=0.05)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1, 2]


def test_what_is_shown(tpimpi: Callable[..., Result], tiny: Path, text: Path) -> None:
    arguments = ("perplexity", str(text), "--model", str(tiny), "--format", "bf16", "--backend", "torch")
    result = tpimpi(*arguments, "--against", "f32")
    assert result.code == 0, result.err
    assert re.fullmatch(
        r"perplexity \d+\.\d{4} ± \d+\.\d{4} over \d+ tokens; "
        r"KL divergence from f32 \d[.\de-]+ ± \d[.\de-]+ nats\n",
        result.out,
    ), result.out
    rows = [line.split()[0] for line in result.err.splitlines() if line.startswith(("bf16 ", "f32 "))]
    assert rows == ["bf16", "f32"]
    assert "chunks of 128" in result.err, "the tiny model has 128 positions"
    quiet = tpimpi(*arguments, "--max-tokens", "20", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert re.fullmatch(r"perplexity \d+\.\d{4} ± \d+\.\d{4} over 19 tokens\n", quiet.out), quiet.out


@pytest.mark.slow
def test_slices_already_made(tpimpi: Callable[..., Result], tiny: Path, text: Path, tmp_path: Path) -> None:
    slices = tmp_path / "slices"
    made = tpimpi("slice", "--model", str(tiny), "--ranks", "1", "--format", "bf16", "--out", str(slices))
    assert made.code == 0, made.err
    found = measure(tpimpi, tmp_path, text, "--slices", str(slices))
    assert found["format"] == "bf16"
    both = measure(tpimpi, tmp_path, text, "--slices", str(slices), "--model", str(tiny), "--against", "f32")
    assert both["perplexity"] == found["perplexity"]
    assert both["against"]["format"] == "f32"


# Bad input


@pytest.mark.parametrize(
    ("content", "arguments", "pattern"),
    [
        (None, [], "the text .*text.txt: No such file"),
        (b"", [], "the text .*text.txt is empty; give some text"),
        (b"x", [], r"the text .*text.txt has 1 token\(s\), must have 2 or more"),
        (b"the fox \xff", [], "the text .*text.txt: not UTF-8 at byte 8"),
        (b"the quick fox", ["--context", "1"], "--context is 1, must be 2 or more"),
        (b"the quick fox", ["--context", "0"], "--context is 0, must be 2 or more"),
        (b"the quick fox", ["--context", "129"], "--context is 129, this model has 128 positions; give at most that"),
        (b"the quick fox", ["--max-tokens", "1"], "--max-tokens is 1, must be 2 or more"),
        (
            b"the quick fox",
            ["--second-half"],
            "tokens, less than a chunk of 128, and --second-half scores whole chunks",
        ),
        (b"the quick fox", ["--second-half", "--context", "2"], "--context is 2, must be 3 or more with --second-half"),
        (b"the quick fox", ["--against", "q9"], "--against is 'q9', must be one of f32, bf16"),
        (b"the quick fox", ["--format", "q9"], "format is 'q9'"),
        (b"the quick fox", ["--slices", "x", "--against", "f32"], "--slices is not enough; give --model too"),
        (b"the quick fox", ["--report", "/"], "--report / is a folder"),
        (b"the quick fox", ["--prompt", "x"], "unrecognized arguments: --prompt x"),
    ],
)
def test_bad_input_is_one_line(
    tpimpi: Callable[..., Result],
    tiny: Path,
    tmp_path: Path,
    content: bytes | None,
    arguments: list[str],
    pattern: str,
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    result = tpimpi("perplexity", str(path), "--quiet", *arguments, env={"TPIMPI_MODEL": str(tiny)})
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.our_lines) == 1, result.err
    assert re.search(pattern, result.our_lines[0]), result.our_lines[0]


@pytest.mark.slow
def test_under_a_launcher_rank_0_alone_says_it(mpirun: Launcher, cache: dict[str, str], tiny: Path) -> None:
    result = mpirun(2, "-m", "tpimpi", "perplexity", "/nowhere", "--model", str(tiny), env=cache, timeout=60)
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.our_lines) == 1, result.err
    assert re.match(r"r0 \S+: the text /nowhere: No such file", result.our_lines[0])


def test_logits_that_are_not_finite(tpimpi: Callable[..., Result], tiny: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:] = 3e38
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = tpimpi("perplexity", str(text), "--model", str(model), "--format", "f32", "--backend", "torch")
    assert (result.code, result.out) == (2, ""), result.err
    assert result.err.splitlines()[-1] == "tpimpi: the logits of f32 are not finite; check the model"
    assert "Warning" not in result.err


def test_help(tpimpi: Callable[..., Result]) -> None:
    result = tpimpi("perplexity", "--help")
    assert (result.code, result.err) == (0, "")
    assert {"--against", "--context", "--max-tokens", "--model", "--window", "--kv"} <= set(result.out.split())
