"""The page of bench/experiments: its tables, pictures and claims, of results that are made up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.experiments import claims as claims_of
from bench.experiments import page_tables, pages, tables
from bench.experiments import results as results_of
from bench.experiments import rows as rows_of
from tests.support.experiment_pages_cases import figures_of, found_of
from tests.support.experiments import result, run
from tests.support.launch import ROOT

# EXP ['results_of', 'rows_of']


# The page


def test_a_page_is_filled_in_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table formats -->\nold\n<!-- end -->\n\nAfter.\n")
    row = next(row for row in rows_of.read_rows("full") if row.measure == "perplexity")
    path = tmp_path / "results.jsonl"
    figures = {
        "tokens_scored": 7,
        "perplexity": 12.5,
        "perplexity_se": 0.25,
        "against": {"perplexity": 12.0, "kl_mean": 0.01},
    }
    path.write_text(json.dumps(result(row, **figures)) + "\n")
    for _ in range(2):  # what is filled in is filled in again
        assert run("page", "--page", page, "--results", path).returncode == 0
        text = page.read_text()
        assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
        assert "| bf16 | 7 | 12.500 ± 0.25 | 12.000 | 0.01 |" in text


def test_a_page_keeps_its_line_ends(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_bytes(b"Before.\r\n<!-- table formats -->\r\n<!-- end -->\r\n")
    results.touch()
    for _ in range(2):
        assert run("page", "--page", page, "--results", results).returncode == 0
        lines = page.read_bytes().split(b"\n")
        assert lines[2:4] == [b"\r", b"Not measured yet.\r"] and all(line.endswith(b"\r") for line in lines[:-1])


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = run("page", "--page", page, "--results", tmp_path / "resutls.jsonl")
    assert (done.returncode, done.stderr.count("\n"), page.exists()) == (2, 1, False)
    assert done.stderr.startswith(f"experiments: --results {tmp_path}/resutls.jsonl: there is no such file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "<!-- table devices -->\nmine\n<!-- table memory -->\n<!-- end -->\n",
            "line 1: table devices has no <!-- end -->",
        ),
        ("mine\n<!-- table devices -->\n", "line 2: table devices has no <!-- end -->"),
        ("<!-- table nonsense -->\n<!-- end -->\n", "line 1: there is no table nonsense; there are "),
    ],
)
def test_a_page_with_wrong_marks_is_refused_and_left_alone(tmp_path: Path, text: str, said: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    (tmp_path / "results.jsonl").touch()
    done = run("page", "--page", page, "--results", tmp_path / "results.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"experiments: {page}, {said}")
    assert page.read_text() == text


# Tables and pictures


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The panels of each picture that a table would draw, by the name of its file."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        page_tables, "plot_lines", lambda panels, path, *more, **ticks: drawn.update({path.name: panels})
    )
    return drawn


LAUNCH = "mpirun -np {ranks} --hostfile home.txt"


@pytest.mark.parametrize("size", rows_of.SIZES)
@pytest.mark.parametrize("machines", [False, True])
def test_every_row_has_a_table_and_in_it_a_command(
    tmp_path: Path, pictures: dict[str, Any], size: str, machines: bool
) -> None:
    rows = rows_of.read_rows(size)
    lines = [result(row, **figures_of(row)) for row in (rows_of.on_machines(rows, 8) if machines else rows)]
    for line in lines:
        words = rows_of.repeat(line["settings"], launch=LAUNCH if machines else "")
        line["command"] = f"python -m bench.experiments run {words}"
    found = [tables.Found(line) for line in lines]
    assert len(claims_of.claims(found)) == 7
    seen: set[str] = set()
    for name, make in page_tables.TABLES.items():
        for part in make(found, tmp_path).split("\n\n"):
            header, *body = part.splitlines()
            if name in ("conditions", "claims") or not header.startswith("|"):
                continue
            assert header.endswith("| `… run` |"), name
            assert all(re.search(r"\| `[^`]+` \|$", row) for row in body[1:]), name
            seen |= {row.rpartition("| `")[2].removesuffix("` |") for row in body[1:]}
    # Whole runs over a network share the command of all ways of adding
    ways = {"each": "allreduce", "launch": LAUNCH if machines else ""}
    for line in lines:
        kind = (line["settings"]["experiment"], line["settings"]["measure"])
        words = line["command"].partition(" run ")[2]
        assert (rows_of.repeat(line["settings"], **ways) if kind == ("network", "generate") else words) in seen


def test_results_without_a_bandwidth_of_the_emulation_still_make_a_table(tmp_path: Path) -> None:
    row = next(row for row in rows_of.read_rows() if row.measure == "emulation")
    old, new = (tables.Found(result(row, **figures_of(row))) for _ in range(2))
    for name in ("bandwidth_wished", "bandwidth"):
        del old.figures[name]
    *_, first, second = page_tables.emulation([old, new], tmp_path).partition("\n\n")[0].splitlines()
    start = "| 1 ms | 1.1 ms | 0.5 | 0.499 | 200 MB/s | 210 MB/s "
    assert first.startswith(f"{start}| - | - | ") and second.startswith(f"{start}| 300 Mbit/s | 287 Mbit/s | ")


@pytest.mark.parametrize(
    ("size", "devices", "network"),
    [
        (
            "full",
            [f"{shape}, 1 GiB a device" for shape in ("open-llama-3b", "llama-2-7b", "llama-2-13b")],
            ["4 devices, 50Mbit/s", "4 devices, 1Gbit/s"],
        ),
        ("quick", ["tinyllama-1.1b, 400 MiB a device"], ["4 devices, 100Mbit/s", "4 devices, 1Gbit/s"]),
        ("smallest", ["tinyllama-1.1b, 300 MiB a device"], ["2 devices, 300Mbit/s"]),
    ],
)
def test_every_size_has_its_pictures(
    tmp_path: Path, pictures: dict[str, Any], size: str, devices: list[str], network: list[str]
) -> None:
    found = [found_of(row) for row in rows_of.read_rows(size)]
    page_tables.devices(found, tmp_path)
    page_tables.network(found, tmp_path)
    assert [title for title, _ in pictures["measured-devices.png"]] == devices
    wanted = [f"{numbers} numbers, {each}" for numbers in (4096, 524288) for each in network]
    assert [title for title, _ in pictures["measured-network.png"]] == wanted
    numbers = {"full": [1, 2, 3, 4], "quick": [1, 4], "smallest": [1, 2]}[size]
    assert all(list(line.x) == numbers for _, lines in pictures["measured-devices.png"] for line in lines)


def test_one_number_of_devices_is_no_picture(tmp_path: Path, pictures: dict[str, Any]) -> None:
    rows = rows_of.choose(rows_of.read_rows(), ["devices"], "devices=4 shape=llama-2-7b")
    page_tables.devices([found_of(row) for row in rows], tmp_path)
    assert not pictures


@pytest.mark.parametrize(
    ("group", "process", "peak"),
    [([3e8, 1e8], [2e8, 4e8], 4e8), ([5e8], 4e8, 5e8), ([None, None], [1e8, 2e8], 2e8), ([], None, None)],
)
def test_the_peak_is_the_larger_of_group_and_process(group: list[Any], process: Any, peak: float | None) -> None:
    row = rows_of.read_rows()[0]
    assert tables.Found(result(row, group_peak_bytes=group, peak_rss_bytes=process)).peak == peak


def test_a_page_shows_one_machine_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    rows = [row for row in rows_of.read_rows() if row.measure == "perplexity"]
    path = tmp_path / "results.jsonl"
    lines = [result(row, **figures_of(row)) for row in (rows[0], rows[1], rows[1])]
    other = {"cpu": "Arm", "cores": 64, "memory_gib": 256, "system": "Linux"}
    lines += [{**result(row, **{**figures_of(row), "perplexity": 99.0}), "machine": other} for row in rows[:1] * 4]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, others = pages.newest(results_of.Results(path))
    assert [each["format"] for each in found] == [rows[0].format, rows[1].format]
    assert "99" not in page_tables.formats(found, tmp_path)
    said = page_tables.conditions(found, tmp_path, others)
    assert "; 2 rows, measured 2026-01-01 at " in said
    assert said.endswith("Not shown are results of other machines: 1 of Arm, 64 cores, 256 GiB, Linux.")
    assert "Not shown" not in page_tables.conditions(found, tmp_path)


def test_the_versions_of_other_programs_are_said(tmp_path: Path) -> None:
    rows = rows_of.choose(
        rows_of.read_rows(), ["peers"], "measure=peer memory=1GiB program=accelerate,airllm,llama.cpp"
    )
    versions = [{"torch": "2.13.0", "accelerate": "1.15.0"}, {"torch": "2.14.0"}, {"llama-cpp-python": "0.3.36"}]
    found = [found_of(row, versions={"python": "3.11.7", **of}) for row, of in zip(rows, versions, strict=True)]
    said = "The other programs: torch 2.13.0 and 2.14.0, accelerate 1.15.0, llama-cpp-python 0.3.36."
    assert said in page_tables.conditions(found, tmp_path).split("\n\n")


def test_the_committed_page_is_made_of_the_committed_results(tmp_path: Path, pictures: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    page, results = ROOT / "docs" / "measurements.md", ROOT / "docs" / "measurements.jsonl"
    made = tmp_path / page.name
    made.write_bytes(page.read_bytes())
    pages.write_page(made, results_of.Results(results))
    committed, now = (
        {match[1]: match[0] for match in pages._PLACE.finditer(path.read_text(encoding="utf-8"))}
        for path in (page, made)
    )
    old = [name for name, text in now.items() if text != committed[name]]
    assert not old, (
        f"{page.relative_to(ROOT)}: {', '.join(old)} are not those of {results.name}; run: python -m bench.experiments page "
        f"--results {results.relative_to(ROOT)} --page {page.relative_to(ROOT)}"
    )
