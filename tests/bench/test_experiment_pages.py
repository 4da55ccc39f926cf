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


def figures_of(row: Any) -> dict[str, Any]:
    """Figures such as a row of this kind has, all of them made up."""
    ranks = [1e8] * row.devices
    token = {"s_per_token": 2.0, "ttft_s": 3.0}
    sums = dict.fromkeys(("star", "exchange", "mesh", "ring", "tree", "library"), 0.02)
    streamed: dict[str, Any] = {"memory_bytes": ranks, "streamed_bytes_per_token": ranks}
    kinds: dict[str, dict[str, Any]] = {
        "generate": {
            **token,
            **streamed,
            "load_s": 1.0,
            "ttft_cold_s": 4.0,
            "pinned_bytes": ranks,
            "peak_rss_bytes": ranks,
            "parts": {"compute": 0.5, "read_wait": 0.25, "star": 0.25},
        },
        "peer": {**token, "load_s": 1.0, "ttft_warm_s": 3.0, "versions": {"python": "3.11.7", "torch": "2.13.0"}},
        "allreduce": {
            "rows": [{"numbers": n, "seconds": sums, "two_hops": 0.01, "auto": "star"} for n in (4096, 524288)]
        },
        "perplexity": {
            "tokens_scored": 7,
            "perplexity": 12.5,
            "perplexity_se": 0.25,
            "against": {"perplexity": 12.0, "kl_mean": 0.01},
        },
        "predict": {"assumed": {"why": "it is said"}, "ranks": {"1": {**token, **streamed, "limit": "disk"}}},
        "emulation": {
            "latency_wished_s": 0.001,
            "latency_s": 0.0011,
            "cores_wished": 0.5,
            "cores": 0.499,
            "read_wished_bps": 2e8,
            "read_bps": 2.1e8,
            "bandwidth_wished": 37_500_000,
            "bandwidth": 35_875_000,
        },
        "ways": {"s_per_token": {"shared memory": 0.04, "loopback": 0.05, "home": 0.06}},
    }
    return kinds[row.measure]


def found_of(row: Any, **figures: Any) -> Any:
    return tables.Found(result(row, **{**figures_of(row), **figures}))


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


# Claims


def device_results(**seconds: tuple[float, float]) -> list[Any]:
    """7B in q4_0 where memory is short, on one device and on four: (first token, token)."""
    rows = rows_of.choose(rows_of.read_rows(), ["devices"], "shape=llama-2-7b format=q4_0 devices=1,4")
    made = []
    for row, (first, token) in zip(rows, seconds.values(), strict=True):
        made.append(tables.Found(result(row, ttft_s=first, ttft_cold_s=first, s_per_token=token)))
    return made


@pytest.mark.parametrize(
    ("one", "four", "verdict"),
    [
        ((20.0, 12.0), (2.0, 1.0), "confirmed"),
        ((20.0, 11.9), (2.0, 1.0), "not so"),
        ((19.0, 30.0), (2.0, 1.0), "not so"),
    ],
)
def test_a_claim_is_judged_by_its_figures(one: tuple[float, float], four: tuple[float, float], verdict: str) -> None:
    judged = {text: (said, figures) for text, said, figures in claims_of.claims(device_results(one=one, four=four))}
    said, figures = next(found for text, found in judged.items() if text.startswith("Ours"))
    assert said == verdict
    assert f"({one[1] / four[1]:.3g}" in figures


@pytest.mark.parametrize(
    ("less", "verdict"), [(0.92, "better"), (0.9, "confirmed"), (0.78, "confirmed"), (0.77, "worse"), (-0.1, "not so")]
)
def test_a_share_is_judged_by_what_is_left_of_it(less: float, verdict: str) -> None:
    assert claims_of._verdict_less(less, 0.8, 0.9) == verdict


def test_what_was_not_measured_is_said_to_be_so() -> None:
    assert {verdict for _, verdict, _ in claims_of.claims([])} == {"not measured"}


def claimed(start: str, found: list[Any]) -> tuple[str, str]:
    return next((verdict, said) for text, verdict, said in claims_of.claims(found) if text.startswith(start))


def star_runs(**seconds: tuple[float, float]) -> list[Any]:
    """Whole runs with the star on five networks: (token, first token) of each."""
    networks = {
        "near": ("0.3ms", "300Mbit/s"),
        "middle": ("2ms", "300Mbit/s"),
        "narrow": ("2ms", "50Mbit/s"),
        "far": ("10ms", "300Mbit/s"),
        "wide": ("2ms", "1Gbit/s"),
    }
    found = []
    for name, (latency, bandwidth) in networks.items():
        only = f"measure=generate allreduce=star latency={latency} bandwidth={bandwidth}"
        (row,) = rows_of.choose(rows_of.read_rows(), ["network"], only)
        token, first = seconds[name]
        found.append(found_of(row, s_per_token=token, ttft_s=first))
    return found


@pytest.mark.parametrize(
    ("middle", "narrow", "verdict"),
    [
        # Latency: middle against near (1 s); bandwidth: narrow against middle
        ((3.0, 3.0), (6.0, 6.0), "confirmed"),  # 3 and 2 times
        ((2.0, 2.0), (3.6, 3.6), "as much as bandwidth"),  # 2 and 1.8 times
        ((2.0, 2.0), (4.4, 4.4), "as much as bandwidth"),  # 2 and 2.2 times
        ((2.0, 2.0), (6.0, 6.0), "not so"),  # 2 and 3 times
        ((2.4, 1.0), (4.8, 6.0), "confirmed for tokens, not so for a prompt"),  # 2.4 and 2, 1 and 6 times
    ],
)
def test_latency_is_judged_beside_as_little_of_the_bandwidth(
    middle: tuple[float, float], narrow: tuple[float, float], verdict: str
) -> None:
    found = star_runs(near=(1.0, 1.0), middle=middle, narrow=narrow, far=(9.0, 1.5), wide=(0.5, 0.5))
    said, figures = claimed("Link latency", found)
    assert said == verdict
    assert "33 times the latency (0.3 to 10 ms) 9.00 and 1.50 times" in figures
    assert claimed("Link latency", found[:4])[0] == "not measured"


def window_rows(computing: float, rows: dict[str, tuple[float, float]]) -> list[Any]:
    """7B in q4_0 with all of it pinned, and with less memory: (streamed GB at 500 MB/s, seconds a token)."""
    found = []
    for memory, (streamed, token) in {"5G": (0.0, computing), **rows}.items():
        only = f"measure=generate format=q4_0 memory={memory}"
        (row,) = rows_of.choose(rows_of.read_rows(), ["memory"], only)
        found.append(found_of(row, s_per_token=token, streamed_bytes_per_token=[streamed * 1e9]))
    return found


@pytest.mark.parametrize(
    ("rows", "verdict", "case"),
    [
        (
            {"4G": (0.1, 1.0), "3G": (0.4, 1.05)},
            "confirmed",
            "the smaller is hidden. Here that is reading, which takes up to ",
        ),
        (
            {"2G": (1.0, 2.0), "1G": (2.0, 4.1)},
            "confirmed, but what reading takes beyond computing still shows",
            "the smaller is hidden. Here that is computing (1000 ms); reading takes 2.00 to 4.00 times as long, and ",
        ),
        (
            {"4G": (0.25, 1.0), "1G": (2.0, 4.0)},
            "confirmed, but what reading takes beyond computing still shows",
            "Here that is reading or computing (1000 ms): reading takes 0.50 to 4.00 times as long, and what it takes",
        ),
        ({"4G": (0.25, 1.5)}, "worse", "(worst: memory 4G): the smaller is not wholly hidden. Here that is reading, "),
    ],
)
def test_what_the_window_hides_is_said_as_it_is(rows: dict[str, tuple[float, float]], verdict: str, case: str) -> None:
    said, figures = claimed("The window", window_rows(1.0, rows))
    assert said == verdict
    assert case in figures
    assert ("nothing hides" in figures) == ("beyond" in verdict)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (95.0, "about the same as it"),
        (114.0, "about the same as it"),
        (80.0, "20 % less than it"),
        (140.0, "40 % more than it"),
    ],
)
def test_offloading_is_told_with_its_cold_first_token(one: float, said: str) -> None:
    home = "peers", "memory=1GiB shape=llama-2-7b format=bf16 "
    found = []
    for only, figures in (
        ("measure=peer program=accelerate", {"s_per_token": 100.0, "ttft_s": 101.0}),
        ("measure=generate devices=1", {"s_per_token": one, "ttft_cold_s": 99.0}),
        ("measure=generate devices=4", {"s_per_token": 15.0, "ttft_cold_s": 18.0}),
    ):
        (row,) = rows_of.choose(rows_of.read_rows(), [home[0]], home[1] + only)
        found.append(found_of(row, **figures))
    verdict, figures_said = claimed("80 to 90 %", found)
    assert verdict == "confirmed"
    assert figures_said == (
        "7B in bf16, four devices, 15 s a token, cold first token 18.0 s: a token takes 85 % less than accelerate (100 s a "
        f"token, cold first token 101 s), one device {said}"
    )
