"""--draft: a small model on rank 0 alone drafts for the model, and changes no token."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.support.tiny_models import write_tiny_hf

PROMPT = "the quick brown fox"
OPTIONS = ("--max-tokens", "24", "--ignore-eos", "--format", "f32")


def test_a_model_drafts_for_itself_on_two_ranks(
    on_ranks: Ranks, cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    found = []
    for number, more in enumerate((("--speculate", "off"), ("--draft", str(tiny), "--speculate", "4"))):
        report = tmp_path / f"{number}.json"
        options = ("--model", str(tiny), *OPTIONS, "--report", str(report), "--memory", "700M")
        result = on_ranks(2, "-m", "tpimpi", *options, *more, env=cache, stdin=f"{PROMPT}\nthe lazy dog\n{PROMPT}\n")
        assert result.code == 0, result.err
        found.append(json.loads(report.read_text())["answers"])
    plain, drafted = found
    assert [answer["token_ids"] for answer in plain] == [answer["token_ids"] for answer in drafted]
    for answer in drafted:
        assert answer["accepted_tokens"] >= 0.8 * answer["drafted_tokens"] > 0
        assert answer["passes"] <= 24 / 3


def test_it_drafts_for_many_prompts_at_once(on_ranks: Ranks, cache: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    lines = [{"custom_id": str(n), "prompt": f"{PROMPT} {n}" * (1 + n % 3), "max_tokens": 9 + n} for n in range(9)]
    (tmp_path / "in").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = []
    for name, more in (("plain", ("--speculate", "off")), ("drafted", ("--draft", str(tiny), "--speculate", "2"))):
        out, report = tmp_path / name, tmp_path / f"{name}.json"
        options = ("--model", str(tiny), "--format", "f32", "--ignore-eos", "--batch-file", str(tmp_path / "in"))
        options = (*options, "--temperature", "0", "--memory", "700M", "--out", str(out), "--report", str(report))
        result = on_ranks(2, "-m", "tpimpi", *options, *more, env=cache)
        assert result.code == 0, result.err
        found.append((out.read_text(), json.loads(report.read_text())))
    (plain, of_plain), (drafted, of_drafted) = found
    assert plain == drafted and not of_plain["batch"]["drafted_tokens"]
    batch, answers = of_drafted["batch"], of_drafted["answers"]
    assert batch["accepted_tokens"] >= 0.8 * batch["drafted_tokens"] > 0
    assert batch["steps"] <= 0.6 * of_plain["batch"]["steps"]
    for name in ("drafted_tokens", "accepted_tokens"):
        assert batch[name] == sum(answer[name] for answer in answers)


def test_its_memory_is_in_the_promise_of_rank_0(tpimpi, smollm2: Path, tmp_path: Path) -> None:
    """A run with too little says what it needs: with a draft model, 97 MB of SmolLM2, so much more."""
    least = []
    for more in ((), ("--draft", str(smollm2))):
        result = tpimpi("--model", str(smollm2), "--memory", "1M", *more, "--prompt", PROMPT)
        assert result.code == 2, result.err
        least.append(int(re.findall(r"needs at least (\d+)\s?M", result.err)[0]))
    assert 90 <= least[1] - least[0] <= 150, least
    (tmp_path / "in").write_text('{"custom_id": "a", "prompt": "x"}\n')
    batch = ("--batch-file", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    result = tpimpi("--model", str(smollm2), "--memory", f"{least[0]}M", "--draft", str(smollm2), *batch)
    assert result.code == 2 and "--parallel (it is 1), or leave --draft out" in result.err, result.err
    assert len(result.our_lines) == 1, result.err


@pytest.mark.slow
def test_where_tiles_have_its_memory_it_is_tried_and_changes_no_token(tpimpi, smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 for itself, in memory for one of them: it comes when tiles have gone, within what rank 0 may take."""
    options = ("--model", str(smollm2), "--context", "256", "--max-tokens", "60", "--ignore-eos", "--prompt", PROMPT)
    found = tpimpi(*options, "--memory", "1M", "--draft", str(smollm2))
    least = int(re.findall(r"needs at least (\d+)\s?M", found.err)[0])
    reports = []
    for number, more in enumerate((("--speculate", "off"), ("--draft", str(smollm2)))):
        report = tmp_path / f"{number}.json"
        result = tpimpi(*options, "--memory", f"{least + 12}M", *more, "--report", str(report))
        assert result.code == 0, result.err
        reports.append(json.loads(report.read_text()))
    plain, drafted = reports
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["drafted_tokens"] >= 6 and drafted["accepted_tokens"] > 0
    (rank,) = drafted["ranks"]
    assert rank["peak_rss_bytes"] <= rank["memory_bytes"]
    assert rank["bytes_read"] > 2 * plain["ranks"][0]["weights_bytes"], "a draft model that was not loaded"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "order",
            r"--draft: the vocabulary of other is not that of tiny: id \d+ is another token; give a model of the same",
        ),
        ("rows", r"--draft: the vocabulary of other is not that of tiny: it has 280 token ids, needed are 2\d\d; give"),
    ],
)
def test_another_vocabulary_is_refused(tpimpi, tiny: Path, tmp_path: Path, change: str, said: str) -> None:
    other = tmp_path / "other"
    if change == "order":
        shutil.copytree(tiny, other)
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab["x"], vocab["z"] = vocab["z"], vocab["x"]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        write_tiny_hf(other, "llama-bias", vocab_size=280)
        tokenizer = json.loads((tiny / "tokenizer.json").read_text())
        text = tokenizer["model"]
        text["vocab"] = {token: number for token, number in text["vocab"].items() if number < 280}
        text["merges"] = [pair for pair in text["merges"] if "".join(pair) in text["vocab"]]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        shutil.copy(tiny / "tokenizer_config.json", other)
    (tmp_path / "in").write_text('{"custom_id": "a", "prompt": "x"}\n')
    batch = ("--batch-file", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    models = ("--model", str(tiny), "--draft", str(other), "--format", "f32")
    for arguments in ((*models, "--prompt", PROMPT), (*models, *batch), ("serve", "--port", "0", *models)):
        result = tpimpi(*arguments, "--quiet")
        assert result.code == 2 and re.search(said, result.err), result.err
        assert len([line for line in result.our_lines if "tpimpi: http" not in line]) == 1, result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--draft", "x", "--speculate", "off"), "--draft is given and --speculate is off"),
        (("--draft", ""), "--draft is empty"),
        (("--draft", "/nowhere/model"), "/nowhere/model"),
    ],
)
def test_what_has_no_meaning_is_refused(tpimpi, tiny: Path, options: tuple[str, ...], said: str) -> None:
    result = tpimpi("--model", str(tiny), *OPTIONS, "--prompt", PROMPT, *options)
    assert result.code == 2 and said in result.err, result.err
