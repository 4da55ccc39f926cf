"""`plan` for mixtures of experts: worked out by hand, and beside what a run reports."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.studies.routing_trace import make_trace
from tests.support.launch import Result
from tests.support.prediction import CONFIG, GB, WORKLOAD, predictor, speed
from tests.support.ranks import Ranks
from tests.support.synth_cases import SMALL
from tests.support.tiny_models import SMALL as TINY_SMALL
from tests.support.tiny_models import TINY
from tpimpi.cli.synth import SynthOptions, synthesize
from tpimpi.diagnostics.planner.hits import HitCurve
from tpimpi.diagnostics.planner.layer_benchmark import LayerBenchmark, LayerBenchmarkConfig
from tpimpi.diagnostics.planner.loads import LayerLoad, Loads
from tpimpi.diagnostics.planner.shares import best_shares
from tpimpi.engine.eviction import Stalest, hit_rate
from tpimpi.models.config_hf import config_from_hf
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import Star
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.partition import make_partition

# In bf16: attention of a layer; the MLP of the dense first one; an expert of 512 columns; the head.
ATTN, MLP, EXPERT, HEAD = 4 * 1024 * 1024 * 2, 3 * 1024 * 2048 * 2, 3 * 1024 * 512 * 2, 4096 * 1024 * 2
MIXTURE = dataclasses.replace(
    CONFIG,
    architecture="qwen3_moe",
    qk_norm=True,
    experts=16,
    experts_per_token=2,
    expert_intermediate=512,
    dense_layers=(0,),
)
MIXED = dataclasses.replace(WORKLOAD, config=MIXTURE, formats=ModelFormats.for_model("bf16", MIXTURE))
TOKEN = 10 * ATTN + MLP + 9 * 2 * EXPERT  # bytes that a token goes through in the layers


def with_memory(*sizes: int) -> object:
    return dataclasses.replace(MIXED, memory=sizes)


# What a rank has to go through


def test_a_token_goes_through_the_experts_that_it_chooses() -> None:
    load = Loads(MIXTURE, MIXED.formats).load(make_partition(MIXTURE, [1.0]).shares[0], 0)
    assert load.layers == (LayerLoad(1, ATTN, MLP), LayerLoad(9, ATTN, 0, EXPERT))
    assert (load.tiles, load.chosen_bytes, load.token) == (10 * ATTN + MLP + HEAD, 18 * EXPERT, TOKEN + HEAD)
    assert load.expert_count == 9 * 16


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss", "glm4-moe", "olmoe"])
def test_loads_are_what_the_slices_hold(kind: str) -> None:
    """With layers that are dense, shared experts, biases; and ranks without a column of an expert."""
    model_type, changes = TINY[kind]
    config = config_from_hf({"model_type": model_type, "hidden_act": "silu", **TINY_SMALL, **changes}, kind)
    formats = ModelFormats.for_model("q8_0", config)
    for weights in ([1.0], [1.0, 1.0], [3.0, 2.0, 1.0, 0.0]):
        for rank, share in enumerate(make_partition(config, weights).shares):
            load = Loads(config, formats).load(share, rank)
            records = list(slice_records(config, share, rank, formats, {}))
            kinds = ("qkv", "attn", "mlp", "head")
            assert load.tiles == sum(record.nbytes for record in records if record.block.kind in kinds)
            of_experts = [record for record in records if record.block.kind == "experts"]
            assert load.expert_count == len(of_experts)
            every = sum(record.nbytes for record in of_experts)
            assert load.chosen_bytes * config.experts == every * config.experts_per_token


# Times and reads


def test_where_all_experts_fit_a_token_computes_with_those_that_it_chooses() -> None:
    found = predictor(speed(2.0, 0.001), head=3.0, workload=MIXED).predict([1.0])
    assert found.compute_s == pytest.approx(10 * 0.001 + 2.0 * TOKEN / GB)
    assert found.s_per_token == pytest.approx(found.compute_s + 3.0 * HEAD / GB)
    (cache,) = found.experts
    assert (cache.held, cache.of, cache.hits, cache.read_bytes) == (144, 144, 1.0, 0)
    assert cache.used_bytes == 18 * EXPERT and found.streamed == (0,)
    # 16 positions cost four times as much a byte, and use 16 (1 - (14/16)^16) of the 16 experts.
    layers = 10 * ATTN + MLP + 9 * 16 * (1 - 0.875**16) * EXPERT
    assert found.first_token_s == pytest.approx(10 * 0.004 + 8.0 * layers / GB + 3.0 * HEAD / GB)


def test_what_is_not_in_the_cache_is_read() -> None:
    """Room for 36 of the 144 experts: with uniform routing a quarter of the 18 uses of a token hit."""
    roomy = predictor(speed(), workload=MIXED).predict([1.0])
    memory = roomy.memory[0] - 108 * EXPERT
    found = predictor(speed(disk_bytes_per_s=50e6), workload=with_memory(memory)).predict([1.0])
    (cache,) = found.experts
    assert (cache.held, cache.hits) == (36, 0.25)
    assert found.streamed == (cache.read_bytes,) == (round(0.75 * 18 * EXPERT),)
    assert found.s_per_token == pytest.approx(0.75 * 18 * EXPERT / 50e6) and found.limit == "disk"
    assert found.memory == (memory,)
    # Of a prompt of 16 positions 9 * 16 (1 - (14/16)^16) experts are used, of which three quarters are read.
    assert found.first_token_s == pytest.approx(0.75 * 9 * 16 * (1 - 0.875**16) * EXPERT / 50e6, rel=1e-6)


def test_experts_have_what_is_left_when_all_else_is_pinned() -> None:
    """The least that works, room for two experts, and tiles that are streamed."""
    roomy = predictor(speed(), workload=MIXED).predict([1.0])
    tight = with_memory(roomy.memory[0] - 144 * EXPERT - 40_000_000)
    found = predictor(speed(disk_bytes_per_s=1e9), workload=tight).predict([1.0])
    assert found.experts[0].held == 2
    assert found.streamed[0] > 40_000_000 + found.experts[0].read_bytes
    assert found.memory[0] <= roomy.memory[0] - 144 * EXPERT - 40_000_000


def test_with_a_window_no_expert_stays() -> None:
    found = predictor(speed(), workload=dataclasses.replace(MIXED, window=2)).predict([1.0])
    assert found.experts[0].held == 2
    whole = predictor(speed(), workload=dataclasses.replace(MIXED, window="all")).predict([1.0])
    assert whole.experts[0].held == 144 and whole.streamed == (0,)


def test_ranks_read_their_columns() -> None:
    """512 columns in 3:1; each rank has room for half of its own."""
    loads = [512 * 3 // 4, 512 // 4]
    roomy = predictor(speed(), speed(), workload=MIXED).predict([3.0, 1.0])
    memory = [size - 72 * 3 * 1024 * columns * 2 for size, columns in zip(roomy.memory, loads, strict=True)]
    found = predictor(speed(), speed(), workload=with_memory(*memory)).predict([3.0, 1.0])
    assert [cache.held for cache in found.experts] == [72, 72]
    assert [cache.read_bytes for cache in found.experts] == [9 * 3 * 1024 * columns * 2 for columns in loads]


def test_shares_leave_rank_0_room_for_the_head() -> None:
    """The head, 160 MB, takes the place of a third of rank 0's experts; a smaller share of them makes up for that."""
    config = dataclasses.replace(MIXTURE, vocab=80_000)
    workload = dataclasses.replace(MIXED, config=config, memory=(GB,), formats=ModelFormats.for_model("bf16", config))
    needed = predictor(speed(), speed(), workload=workload).predict([1, 1]).memory[1]
    tight = dataclasses.replace(workload, memory=(needed - 72 * EXPERT // 2,))
    ranks = [speed(disk_bytes_per_s=30e6)] * 2
    equal, best = (find(predictor(*ranks, workload=tight)) for find in (lambda p: p.predict([1, 1]), _best))
    assert equal.limit == "disk" and equal.limit_rank == 0
    first, second = map(int, best.shares.split(","))
    assert first < second and best.s_per_token < 0.85 * equal.s_per_token


def _best(found: object) -> object:
    return best_shares(found, 2)


def test_a_layer_is_measured_with_as_many_experts_as_positions_choose() -> None:
    """64 positions that choose 2 of 32 experts by themselves use 32 (1 - (30/32)^64) = 31.5 of them, one position 2."""
    config = dataclasses.replace(MIXTURE, experts=32, expert_intermediate=64)
    formats = ModelFormats.for_model("q4_0", config)
    settings = LayerBenchmarkConfig(
        config=config.to_dict(),
        formats=formats.to_dict(),
        ranks=1,
        positions=64,
        start=16,
        backend="native",
        threads=1,
        cores_shared_by=[1],
        allreduce="star",
        wire="f32",
        kv_format="auto",
        memory=None,
    )
    star = Star(None)
    benchmark = LayerBenchmark(star.rank, settings)
    token, _, chunk, _ = benchmark.timings(star)  # the larger size first
    benchmark.close()
    attn, expert = (4 * 1024 * 1024 * 18 // 32, 3 * 1024 * 64 * 18 // 32)
    assert (token.positions, token.nbytes) == (1, attn + 2 * expert)
    assert chunk.positions == 64
    assert (chunk.nbytes - attn) / expert == pytest.approx(31.5, abs=1.5)


# The hit curve


def test_a_cache_hits_what_a_trace_uses_again() -> None:
    """All positions choose the same two experts of each layer; or each position the two after those of the one before, of
    sixteen, so that the ones that went longest ago are always those that come next."""
    positions = np.arange(64)[:, None, None]
    same = np.broadcast_to(np.array([3, 5], np.uint16), (64, 10, 2))
    around = np.broadcast_to((2 * positions + np.arange(2)) % 16, (64, 10, 2)).astype(np.uint16)
    curve = HitCurve(MIXTURE, same)
    assert curve.at(1 / 8) == 1.0 and curve.at(0.0) == 0.0
    assert curve.at(3 / 32) == (curve.at(1 / 16) + 1) / 2  # a straight line
    assert HitCurve(MIXTURE, around).at(1 / 2) == 0.0 and HitCurve(MIXTURE, around).at(1.0) == 1.0


def test_hits_are_those_of_a_plain_list() -> None:
    """One layer, in which what is stalest is what was used least recently."""
    trace = make_trace(32, 3, 1, 300, seed=2)
    recent: list[int] = []
    found = 0
    for position, (experts,) in enumerate(trace.tolist()):
        found += sum(expert in recent for expert in experts) * (position >= 75)
        recent = [*(expert for expert in recent if expert not in experts), *experts][-12:]
    assert hit_rate(trace, 12, Stalest(1)) == pytest.approx(found / (225 * 3), abs=0.01)


def test_positions_that_choose_by_themselves_use_so_many_experts() -> None:
    dice = np.random.default_rng(0)
    drawn = [len({e for _ in range(12) for e in dice.choice(16, 2, replace=False)}) for _ in range(2000)]
    curve = HitCurve(MIXTURE, None)
    assert curve.distinct(12) == pytest.approx(np.mean(drawn), rel=0.01)
    assert curve.distinct(1) == 2


# Beside a run


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a mixture whose 96 experts are 1.2 MB each in f32, a trace for it, and slices that follow it."""
    folder = tmp_path_factory.mktemp("traced")
    values = {
        **SMALL,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "intermediate_size": 384,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(values))
    np.save(folder / "trace.npy", make_trace(32, 4, 3, 240, seed=3))
    (folder / "prompt.txt").write_text("5 6 7 8")
    shape, trace = str(folder / "config.json"), str(folder / "trace.npy")
    synthesize(SynthOptions(shape, None, "f32", 0, "slices", 1, None, trace, 1.0, str(folder / "s"), True))
    return folder


def test_a_run_hits_and_reads_what_was_planned(tpimpi: Callable[..., Result], traced: Path, tmp_path: Path) -> None:
    """Of positions 60 to 240 of the trace, those that plan counts: the difference of two runs. What a rank takes without a
    model differs by some MB from start to start, and an expert has 1.2 MB: so plan's count of the run's places is compared.
    """
    common = ("--memory", "160M", "--context", "256", "--kv", "f32", "--quiet")
    about = ("--shape", str(traced / "config.json"), "--format", "f32", "--routing", str(traced / "trace.npy"))
    found = tpimpi("plan", *about, *common, "--json", str(tmp_path / "plan.json"))
    assert found.code == 0, found.err
    assert "experts are chosen as in the trace of --routing, 240 positions" in found.out
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    (planned,) = plan["experts"]
    assert 0.2 < planned["held"] / planned["of"] < 0.8  # or the test shows nothing
    did = []
    for tokens in (57, 237):
        run = ("--slices", str(traced / "s"), "--raw", "--prompt-file", str(traced / "prompt.txt"), "--ignore-eos")
        report = tmp_path / f"{tokens}.json"
        arguments = (*run, *common, "--predict", "0", "--speculate", "off", "--max-tokens", str(tokens))
        found = tpimpi(*arguments, "--report", str(report))
        assert found.code == 0, found.err
        did.append(json.loads(report.read_text())["ranks"][0])
    expert_bytes = planned["used_bytes"] // (3 * 4)
    held = (did[1]["weights_bytes"] - did[1]["pinned_bytes"]) / expert_bytes
    assert held == pytest.approx(planned["held"], abs=4)
    used, hits, nbytes = (did[1]["experts"][key] - did[0]["experts"][key] for key in ("used", "hits", "bytes_read"))
    assert used == 180 * 3 * 4
    config = config_from_hf(json.loads((traced / "config.json").read_text()), "traced")
    hit_part = HitCurve(config, np.load(traced / "trace.npy")).at(held / planned["of"])
    assert planned["hits"] == pytest.approx(hit_part, abs=0.02)
    assert planned["read_bytes"] == pytest.approx((1 - planned["hits"]) * planned["used_bytes"], rel=0.01)
    assert hits / used == pytest.approx(hit_part, abs=0.01)
    assert nbytes / (180 * 3 * 4 * expert_bytes) == pytest.approx(1 - hit_part, abs=0.01)


def test_chunks_are_longer_where_few_experts_fit(tpimpi: Callable[..., Result], traced: Path, tmp_path: Path) -> None:
    """With the same answer, and as planned."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(str(3 + number % 150) for number in range(700)))
    common = ("--memory", "160M", "--context", "2048", "--quiet")
    run = ("--slices", str(traced / "s"), "--raw", "--prompt-file", str(prompt), "--ignore-eos", "--max-tokens", "8")
    did = {}
    for chunk in ("auto", "100"):
        report = tmp_path / f"{chunk}.json"
        more = () if chunk == "auto" else ("--prompt-chunk", chunk)
        found = tpimpi(*run, *common, *more, "--report", str(report))
        assert found.code == 0, found.err
        did[chunk] = json.loads(report.read_text())
    auto, short = did["auto"], did["100"]
    assert auto["prompt_chunk"] > 700 and auto["prompt_chunk"] % 128 == 0 and short["prompt_chunk"] == 100
    assert auto["token_ids"] == short["token_ids"]
    assert auto["ranks"][0]["experts"]["bytes_read"] < 0.7 * short["ranks"][0]["experts"]["bytes_read"]
    assert auto["ranks"][0]["peak_rss_bytes"] <= 160e6
    about = ("--shape", str(traced / "config.json"), "--format", "f32", "--json", str(tmp_path / "plan.json"))
    found = tpimpi("plan", *about, *common)
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert plan["prompt_chunk"] == pytest.approx(auto["prompt_chunk"], rel=0.2)


def test_the_worst_case_is_said(tpimpi: Callable[..., Result], traced: Path) -> None:
    found = tpimpi("plan", "--shape", str(traced / "config.json"), "--format", "f32", "--memory", "160M")
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    # Parameters: attention 2.5 x 256^2 a layer, experts 3 x 256 x 384; embedding and head 160 x 256; norms and routers.
    whole = 3 * (2.5 * 256**2 + 32 * 3 * 256 * 384 + 32 * 256 + 512) + 2 * 160 * 256 + 256
    used = whole - 3 * 28 * 3 * 256 * 384
    assert lines[1].startswith(
        f"32 experts a layer, 4 for a token: {used / 1e9:.3g} of {whole / 1e9:.3g} billion parameters, "
    )
    assert lines[2] == "all experts are equally likely: the worst case; --routing FILE takes a trace"
    assert "experts held" in lines[4] and "hits" in lines[4] and "read a token" in lines[4]


def test_plan_of_ranks_and_the_best_shares_of_a_mixture(
    on_ranks: Ranks, traced: Path, tmp_path: Path, cache: dict[str, str]
) -> None:
    report = tmp_path / "plan.json"
    about = ("--shape", str(traced / "config.json"), "--format", "f32", "--prompt-tokens", "40", "--json", str(report))
    found = on_ranks(2, "-m", "tpimpi", "plan", *about, env=cache)
    assert found.code == 0, found.err
    for plan in json.loads(report.read_text())["plans"]:
        assert plan["s_per_token"] > 0 and plan["first_token_s"] > 0
        assert len(plan["experts"]) == plan["ranks"] and plan["prompt_chunk"] == 512


def test_auto_shares_of_a_mixture(tpimpi: Callable[..., Result], on_ranks: Ranks, traced: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    synth = ("synth", "--shape", str(traced / "config.json"), "--layers", "1", "--format", "q4_0", "--quiet")
    assert tpimpi(*synth, "--as", "gguf", "--out", str(model)).code == 0
    env = {"TPIMPI_CACHE": str(tmp_path / "cache"), "TPIMPI_MODEL": ""}
    run = ("--model", str(model), "--shares", "auto", "--raw", "--prompt", "5 6 7", "--max-tokens", "4")
    found = on_ranks(2, "-m", "tpimpi", *run, env=env)
    assert found.code == 0, found.err
    assert re.search(r"^shares: \S+ \(auto; predicted [0-9.]+ s/token", found.err, re.MULTILINE)
    assert len(found.out.split()) == 4


@pytest.mark.parametrize("trace", [(3, 2), (2, 4)])
def test_a_trace_of_another_model_is_refused(
    tpimpi: Callable[..., Result], traced: Path, trace: tuple[int, int], tmp_path: Path
) -> None:
    np.save(tmp_path / "t.npy", np.zeros((5, *trace), np.uint16))
    about = ("plan", "--shape", str(traced / "config.json"), "--routing", str(tmp_path / "t.npy"))
    found = tpimpi(*about)
    assert found.code == 2
    (line,) = found.err.splitlines()
    assert f"is of {trace[0]} layers and {trace[1]} experts a token" in line and "has 3 and 4" in line
