"""The main job on the real model: the same tokens as transformers, for every number of ranks, window and way to run."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support.launch import PROGRAMS, Launcher, run_command
from tests.support.ranks import Ranks
from tests.support.traces import passes_of
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

PROMPTS = [
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "List three prime numbers and explain why 9 is not one.",
]
TOKENS = 40
FEW_TOKENS = 12
CLOSE = 0.002  # two best logits nearer than this may change places when sums are ordered differently


class Answer(NamedTuple):
    """Greedy ids, how many of them are certain, and the token that ended the answer."""

    ids: list[int]
    certain: int
    end: int | None


@pytest.fixture(scope="module")
def oracle(smollm2: Path, request: pytest.FixtureRequest) -> list[Answer]:
    """For each prompt what transformers answers. Minutes of work, so pytest's cache keeps it for the next suite."""
    asked = json.dumps([metadata.version("transformers"), smollm2.name, smollm2.stat().st_size, PROMPTS, TOKENS, CLOSE])
    key = f"tpimpi/smollm2-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    cache = request.config.cache
    found = None if cache is None else cache.get(key, None)
    answers = [Answer(*answer) for answer in found] if found else _answers_of_transformers(smollm2)
    if cache is not None:
        cache.set(key, [list(answer) for answer in answers])
    assert sum(answer.certain for answer in answers) > 100, "too little is certain for the comparison to mean something"
    return answers


def _answers_of_transformers(smollm2: Path) -> list[Answer]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    where = {"pretrained_model_name_or_path": str(smollm2.parent), "gguf_file": smollm2.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids, certain, end, past, tokens = [], None, None, None, chat["input_ids"]
        with torch.no_grad():
            for _ in range(TOKENS):
                out = model(tokens, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[0, -1]
                best = torch.topk(logits, 2)
                if certain is None and (best.values[0] - best.values[1]).item() < CLOSE:
                    certain = len(ids)
                token = int(best.indices[0])
                if token == tokenizer.eos_token_id:
                    end = token
                    break
                ids.append(token)
                tokens = best.indices[:1][None]
        answers.append(Answer(ids, len(ids) if certain is None else certain, end))
    return answers


def _check(report: Path, oracle, tokens: int = TOKENS) -> None:
    """The first `tokens` of each answer; the end of one that ends within them."""
    answers = json.loads(report.read_text())["answers"]
    assert len(answers) == len(PROMPTS)
    for answer, (ids, certain, end) in zip(answers, oracle, strict=True):
        assert answer["token_ids"][:certain] == ids[: min(certain, tokens)]
        if certain == len(ids):
            assert len(answer["token_ids"]) == min(len(ids), tokens), f"it should have ended with {end} here"


@pytest.mark.parametrize(
    ("ranks", "backend", "tokens"),
    [  # some to the end of the answers; what is cut in a wrong place shows in the first tokens
        *((ranks, "native", FEW_TOKENS) for ranks in (2, 5, 7, "4,2,2,1")),
        *((ranks, "native", TOKENS) for ranks in (1, 3, 4)),
        (1, "torch", FEW_TOKENS),
        (3, "torch", TOKENS),
    ],
)
@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(
    on_ranks: Ranks, cache: dict[str, str], oracle, ranks: int | str, backend: str, tokens: int, tmp_path: Path
) -> None:
    shares = ["--shares", ranks] if isinstance(ranks, str) else []
    count = len(ranks.split(",")) if isinstance(ranks, str) else ranks
    report = tmp_path / "report.json"
    result = on_ranks(
        count,
        *("-m", "tpimpi", "--format", "f32", "--allreduce", "star", "--max-tokens", str(tokens), *shares),
        *("--backend", backend, "--report", str(report)),
        env=cache,
        stdin="".join(f"{prompt}\n" for prompt in PROMPTS),
        timeout=600,
    )
    assert result.code == 0, result.err
    _check(report, oracle, tokens)
    texts = [answer["text"] for answer in json.loads(report.read_text())["answers"]]
    assert result.out == "".join(text if text.endswith("\n") else text + "\n" for text in texts)


@pytest.mark.parametrize("speculate", ["auto", "15"])
@pytest.mark.slow
def test_drafts_change_no_token(on_ranks: Ranks, cache: dict[str, str], oracle, speculate: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = on_ranks(
        2,
        *("-m", "tpimpi", "--format", "f32", "--allreduce", "star", "--max-tokens", str(TOKENS), "--memory", "500M"),
        *("--speculate", speculate, "--report", str(report), "--trace", str(tmp_path / "trace.json")),
        env=cache,
        stdin="".join(f"{prompt}\n" for prompt in PROMPTS),
        timeout=600,
    )
    assert result.code == 0, result.err
    _check(report, oracle)
    answers = json.loads(report.read_text())["answers"]
    assert speculate == "auto" or sum(answer["drafted_tokens"] for answer in answers) > 0
    passes = passes_of(tmp_path / "trace.json")
    for name, of_answers in (("drafted", "drafted_tokens"), ("accepted", "accepted_tokens"), ("rows", "rows_computed")):
        assert sum(one[name] for one in passes) == sum(answer[of_answers] for answer in answers)
    assert sum(one["tokens"] > 0 for one in passes) == sum(answer["passes"] for answer in answers)


@pytest.mark.slow
def test_without_a_launcher_it_answers_alone(cache: dict[str, str], oracle, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tpimpi", "--format", "f32", "--max-tokens", str(TOKENS), "--report", str(report)]
    command += ["--window", "2"]
    result = run_command(command, env=cache, stdin="\n".join(PROMPTS))  # the last line has no end
    assert result.code == 0, result.err
    _check(report, oracle)


@pytest.mark.parametrize(("fmt", "backend"), [("f32", "torch"), ("auto", "native")])
@pytest.mark.slow_but("auto-native")
@pytest.mark.any_mpi
def test_logits_are_the_same_to_the_bit_for_every_window(
    on_ranks: Ranks, smollm2: Path, tmp_path: Path, fmt: str, backend: str
) -> None:
    with open_source(smollm2) as source:
        slice_model(source, make_partition(source.config, [1, 1, 1]), choose_formats(source, fmt), tmp_path / "slices")
    ids = np.random.default_rng(3).integers(3, 49152, 24).tolist()
    job = {"slices": str(tmp_path / "slices"), "ids": ids, "chunks": [16, 4, 1, 1, 1, 1], "backend": backend}
    windows = [2, 4, 7, "all", 0.0, 0.3, 0.9]  # blocks; or the part of the tiles for which the memory has room
    ways = [{"pins" if isinstance(w, float) else "window": w} for w in windows]
    jobs = [{**job, "name": f"w{w}", **way} for w, way in zip(windows, ways, strict=True)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    result = on_ranks(3, str(PROGRAMS / "logits.py"), str(tmp_path / "jobs.json"), str(tmp_path))
    assert result.code == 0, result.err
    logits = {window: np.load(tmp_path / f"w{window}.npy") for window in windows}
    assert np.ptp(logits["all"]) > 1
    for window in windows:
        assert logits[window].tobytes() == logits["all"].tobytes(), f"window or pins {window}"


@pytest.mark.slow
def test_the_report_says_what_was_done(mpirun: Launcher, cache: dict[str, str], tmp_path: Path) -> None:
    report, prompt = tmp_path / "report.json", tmp_path / "prompt.txt"
    prompt.write_text("Count to twenty.")
    result = mpirun(
        2,
        *("-m", "tpimpi", "--prompt-file", str(prompt), "--max-tokens", "12", "--ignore-eos", "--window", "2"),
        *("--format", "f32", "--backend", "torch", "--allreduce", "star"),
        *("--report", str(report)),
        env=cache,
    )
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    keys = [
        "text",
        "token_ids",
        "prompt_tokens",
        "load_s",
        "ttft_s",
        "s_per_token",
        "s_per_token_mean",
        "model",
        "format",
        "backend",
        "allreduce",
        "ranks",
    ]
    assert set(keys) <= set(found)
    assert len(found["token_ids"]) == 12
    assert (found["format"], found["backend"], found["allreduce"]) == ("f32", "torch", "star")
    assert [(r["heads"], r["columns"]) for r in found["ranks"]] == [(5, 768), (4, 768)]
    for rank in found["ranks"]:
        slice_bytes = rank["columns"] * 3 * 576 * 4 * 30
        # A window that streams reads every tile again for each token; the first needs a pass of its own.
        assert rank["bytes_read"] > 11 * slice_bytes
        assert 50e6 < rank["peak_rss_bytes"] < 2e9
        assert min(rank[key] for key in ("compute_s", "star_s", "read_wait_s")) >= 0
    assert found["ttft_s"] > 0
    assert found["s_per_token"] > 0 and found["s_per_token_mean"] > 0
    # The tables of memory and of the run: a line for each rank in both.
    lines = result.err.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("r0 ", "r1 "))] == ["r0", "r1"] * 2
    assert any("s/token" in line for line in lines)


@pytest.mark.parametrize("window", ["2", "all"])
@pytest.mark.slow
def test_a_native_rank_is_light(mpirun: Launcher, cache: dict[str, str], window: str, tmp_path: Path) -> None:
    """At most 90 MB beside weights, cache and tokenizer, which the report tells apart."""
    report = tmp_path / "report.json"
    arguments = (
        "-m",
        "tpimpi",
        "--backend",
        "native",
        "--window",
        window,
        "--max-tokens",
        "12",
        "--report",
        str(report),
    )
    for prepare in (True, False):  # the first run makes the slices, in rank 0's memory
        result = mpirun(2, *arguments, env=cache, stdin=f"{PROMPTS[0]}\n")
        assert result.code == 0, (prepare, result.err)
    ranks = json.loads(report.read_text())["ranks"]
    for rank in ranks:
        assert 20e6 < rank["base_bytes"] <= 90e6, rank
        parts = ("weights_bytes", "cache_bytes", "tokenizer_bytes", "base_bytes")
        assert sum(rank[part] for part in parts) == rank["peak_rss_bytes"]
        assert rank["cache_bytes"] > 0
    assert ranks[0]["tokenizer_bytes"] > 10e6 and ranks[1]["tokenizer_bytes"] == 0
    if window == "all":  # every weight once: some 0.7 bytes each of the 106 M in the layers, and rank 0's head
        assert 90e6 < sum(rank["weights_bytes"] for rank in ranks) < 120e6
