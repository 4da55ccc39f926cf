"""--keep-cache: keys and values of a session in files between runs, of every rank or of none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import PROGRAMS, Result
from tests.support.messages import assert_one_line
from tests.support.ranks import Ranks
from tests.support.tiny_models import slice_tiny

# Windows, experts, heads of blocks, queries and keys normed over all heads; each format of the cache.
KINDS = {"gemma3": "f16", "llama-bias": "f32", "qwen3": "q8_0", "gpt-oss": "f16", "olmo2": "f16"}
PROMPT, TOKENS, NEW = 70, 6, 10  # of the program's conversation
HELD = PROMPT + TOKENS - 1  # the last token went through no layer
# What was done to a file, and what is then said.
SAID = {
    "damaged": r"\.kv is damaged, or was written with another key",
    "half": r"\.kv is damaged, or was written with another key",
    "positions": r"\.kv is of another sequence, or another rank",
    "shares": r"\.kv has shares 9,\S*, this run \S+",
    "model": r"\.kv has fingerprint 0\S+, this run \S+",
    "nonsense": r"\.kv is damaged, or no file of keys and values",
    "no text": r"\.kv is damaged, or no file of keys and values",
    "removed": r"\.kv is not there",
    "another rank's": r"\.kv is of another sequence, or another rank",
    "another answer": "the conversation is not the one that was kept",
    "key damaged": r"session-\d\.cache is damaged",
    "before": r"\.kv is of another sequence, or another rank",
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.slow_but("2")
@pytest.mark.any_mpi
def test_a_conversation_goes_on_from_files_and_from_damaged_ones_as_without(
    on_ranks: Ranks, ranks: int, tmp_path: Path
) -> None:
    cases = []
    for kind, kv in KINDS.items():
        cases.append([str(slice_tiny(tmp_path, kind, ranks)), kv])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    result = on_ranks(ranks, str(PROGRAMS / "kept_pages.py"), str(tmp_path / "cases.json"), str(tmp_path))
    assert result.code == 0, result.err
    for number, kind in enumerate(KINDS):
        anew, *others = json.loads((tmp_path / f"{kind}.json").read_text())
        missed = {"nothing", *(() if number else {*SAID, "less room"})} - {other["what"] for other in others}
        assert missed == ({"another rank's"} if ranks == 1 and not number else set())
        for other in others:
            assert other["ids"] == anew["ids"], (kind, other)
            there = {"nothing": HELD, "less room": PROMPT - 2}.get(other["what"], 0)
            assert (other["there"], other["rows"]) == (there, HELD + 1 + NEW - there + TOKENS - 1), (kind, other)
            said = SAID.get(other["what"])
            assert re.search(said, other["problem"]) if said else other["problem"] is None, (kind, other)
            rank = re.match(r"r(\d) \S+: .*-r(\d)\.kv ", other["problem"] or "")
            assert ranks == 1 or ".kv" not in (other["problem"] or "") or (rank and rank[1] == rank[2])


def talk(tpimpi: Callable[..., Result], model: Path, *arguments: str, **options: object) -> Result:
    return tpimpi(
        *("--model", str(model), "--format", "f32", "--max-tokens", "5", "--ignore-eos", *arguments), **options
    )


def test_runs_compute_only_what_is_new(tpimpi, tiny: Path, tmp_path: Path) -> None:
    """Each with a process of its own; the second is another turn, the third has other weights."""
    report, files = tmp_path / "report.json", tmp_path / "deep" / "kept"
    options = ("--session", str(tmp_path / "s"), "--keep-cache", str(files), "--report", str(report))
    alone = ("--session", str(tmp_path / "other"))

    def rows() -> list[tuple[int, int]]:
        answers = json.loads(report.read_text())["answers"]
        return [(answer["cached_tokens"], answer["rows_computed"]) for answer in answers]

    first = talk(tpimpi, tiny, *options, "--raw", "--prompt", "the quick brown fox")
    assert first.code == 0, first.err
    ((_, computed),) = rows()
    assert talk(tpimpi, tiny, *alone, "--raw", "--prompt", "the quick brown fox").out == first.out
    second = talk(tpimpi, tiny, *options, stdin=" the dog\n over\n")
    assert (second.code, "computed again" in second.err) == (0, False), second.err
    (cached, fewer), _ = rows()
    assert cached == computed and fewer < computed
    assert talk(tpimpi, tiny, *alone, stdin=" the dog\n over\n").out == second.out
    (path,) = files.iterdir()
    assert (tmp_path / "s.cache").stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    third = talk(tpimpi, tiny, *options, "--kv", "f16", "--prompt", " jumps")
    said = f"the conversation so far is computed again: {path} has kv f32, this run f16\n"
    assert (third.code, said in third.err, rows()[0][0]) == (0, True, 0), third.err
    assert path.read_bytes() != before
    assert talk(tpimpi, tiny, *alone, "--kv", "f16", "--prompt", " jumps").out == third.out


def test_ranks_with_other_shares_or_other_weights_compute_it_again(
    on_ranks: Ranks, cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    """And what they keep then is of use to the next run like theirs. The tiny model has two heads of keys and values."""
    common = ("-m", "tpimpi", "--model", str(tiny), "--raw", "--max-tokens", "5", "--ignore-eos")
    kept = ("--session", str(tmp_path / "s"), "--keep-cache", str(tmp_path / "kept"))
    runs = [
        (2, "f32", "1,1", None),
        (2, "f32", "1,1", ""),
        (2, "f32", "9,1", r"r0 \S+: \S+\.kv has shares "),  # the second rank has none of these heads
        (2, "f32", "9,1", ""),
        (2, "q8_0", "9,1", r"r0 \S+: \S+\.kv has format f32\S*, this run q8_0"),
        (3, "q8_0", "1,1,1", r"r0 \S+: \S+\.kv has shares "),
        (3, "q8_0", "1,1,1", ""),
    ]
    for number, (ranks, fmt, shares, said) in enumerate(runs):
        how = ("--format", fmt, "--shares", shares, "--report", str(tmp_path / "report"))
        shutil.copy(tmp_path / "s", tmp_path / "alone") if number else None
        asked = f" {number} lazy dogs jump"
        result = on_ranks(ranks, *common, *how, *kept, env=cache, stdin=asked + "\n")
        assert result.code == 0, result.err
        (answer,) = json.loads((tmp_path / "report").read_text())["answers"]
        found = re.findall(r"the conversation so far is computed again: (.*)", result.err + result.out)
        assert len(found) == bool(said) and (not said or re.match(said, found[0])), (number, result.err)
        assert (answer["cached_tokens"] > 0) == (said == ""), number
        assert answer["cached_tokens"] + answer["rows_computed"] == answer["prompt_tokens"] + 4
        alone = on_ranks(ranks, *common, *how, "--session", str(tmp_path / "alone"), env=cache, stdin=asked + "\n")
        (wanted,) = json.loads((tmp_path / "report").read_text())["answers"]
        assert (alone.code, answer["token_ids"]) == (0, wanted["token_ids"]), (number, alone.err)


def test_what_cannot_be_is_said(tpimpi, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    session, kept = ("--session", str(tmp_path / "s")), ("--keep-cache", str(tmp_path / "kept"))
    fox = ("--prompt", "the fox")
    assert_one_line(talk(tpimpi, tiny, *fox, *kept), "--keep-cache is given and --session is not")
    wrong = talk(tpimpi, tiny, *fox, *session, "--keep-cache", str(tmp_path / "file"), "--quiet")
    assert_one_line(wrong, r"--keep-cache \S+/file is there and is no folder")
    (tmp_path / "s.cache").write_text("my notes")
    assert_one_line(talk(tpimpi, tiny, *fox, *session, *kept, "--quiet"), r"s\.cache, which is there and is something")
    assert (tmp_path / "s.cache").read_text() == "my notes"
    # Without the package, one line; and a run that asks for nothing of it does not miss it.
    (tmp_path / "none" / "cryptography").mkdir(parents=True)
    (tmp_path / "none" / "cryptography" / "__init__.py").write_text("raise ModuleNotFoundError(name='cryptography')")
    missing = {"PYTHONPATH": str(tmp_path / "none")}
    session = ("--session", str(tmp_path / "t"))
    said = "package cryptography is missing on this host; install tpimpi there"
    assert_one_line(talk(tpimpi, tiny, *fox, *session, *kept, "--quiet", env=missing), said, code=1)
    assert talk(tpimpi, tiny, *fox, *session, env=missing).code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named_and_the_answer_is_there(tpimpi, tiny: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    options = ("--session", str(tmp_path / "s"), "--keep-cache", str(kept), "--quiet")
    first = talk(tpimpi, tiny, *options, "--prompt", "the fox")
    assert (first.code, first.err) == (0, ""), first.err
    (path,) = kept.iterdir()
    path.unlink()
    path.symlink_to("/dev/full")  # which is written as it is, and has no room
    second = talk(tpimpi, tiny, *options, "--prompt", "the dog")
    assert (second.code, len(second.out) > 3) == (0, True)
    assert second.our_lines == [
        f"tpimpi: keys and values are not kept, the next run computes them again: {path}: No space left on device; make "
        "room, or use another place"
    ], second.err
