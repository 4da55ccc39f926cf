"""Random weights that follow a trace of routing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.studies.expert_eviction import FrequencyWithAging
from bench.studies.routing_trace import make_trace
from tests.support.synth_cases import Cli
from tests.support.tiny_models import SMALL, TINY
from tpimpi.cli.synth import SynthOptions, synthesize
from tpimpi.compute.backends.reference import NumpyBackend
from tpimpi.engine.eviction import ExpertKey, LeastRecentlyUsed, Stalest, hit_rate
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.experts import Experts
from tpimpi.engine.readers import Readers
from tpimpi.errors import InputError
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name

LAYERS, EXPERTS, CHOSEN = 3, 8, 3


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    model_type, changes = TINY["qwen3-moe"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SMALL, **changes}))
    return tmp_path


def _synthesize(shape: Path, trace: np.ndarray | None, *, predicted: float = 1.0, kind: str = "slices") -> Path:
    if trace is not None:
        np.save(shape / "trace.npy", trace)
    out = shape / "out"
    ranks = 1 if kind == "slices" else None
    synthesize(
        SynthOptions(str(shape), None, "f32", 0, kind, ranks, None, str(shape / "trace.npy"), predicted, str(out), True)
    )
    return out / slice_name(0, 1)


def _trace() -> np.ndarray:
    return make_trace(EXPERTS, CHOSEN, LAYERS, 5, seed=1)


def test_experts_are_those_of_the_trace_from_its_beginning_again(shape: Path) -> None:
    trace = _trace()
    file = SliceFile(_synthesize(shape, trace))
    records = {ExpertKey(record.block.layer, record.expert): record for record in file.records_of("experts")}
    cache = ExpertCache(file, records, nbytes=None, readers=Readers(1))
    resident = file.load(file.records_of("resident")[0]).parts
    experts = Experts(file.header.config, resident, cache, NumpyBackend(1))
    h = np.random.default_rng(0).standard_normal((4, file.header.config.hidden)).astype(np.float32)
    np.testing.assert_array_equal(experts.route(h, 2, np.arange(3, 7, dtype=np.int32)).experts, trace[[3, 4, 0, 1], 2])
    assert experts.route(h, 0, np.arange(4, dtype=np.int32)).weights.sum(axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    cache.close()
    file.close()


@pytest.mark.parametrize("predicted", [0.0, 0.7, 1.0])
def test_the_stated_part_is_predicted_rightly(shape: Path, predicted: float) -> None:
    file = SliceFile(_synthesize(shape, _trace(), predicted=predicted))
    cache = ExpertCache(file, {}, nbytes=None, readers=Readers(1))
    experts = Experts(file.header.config, file.load(file.records_of("resident")[0]).parts, cache, NumpyBackend(1))
    right = [
        np.isin(experts._guesses(chosen, 0, start), chosen).mean()
        for start in range(400)
        for chosen in [experts._of_trace(0, np.array([start], np.int32))]
    ]
    # A guess that is wrong may name another of the chosen by chance.
    by_chance = (1 - predicted) * CHOSEN / EXPERTS
    assert np.mean(right) == pytest.approx(predicted + by_chance, abs=0.04)
    cache.close()
    file.close()


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        (np.zeros((5, LAYERS), np.uint16), r"holds uint16 \[5, 3\]; whole numbers \[positions, layers, chosen\]"),
        (np.zeros((5, LAYERS, CHOSEN), np.float32), "holds float32"),
        (_trace()[:, :2], "is of 2 layers and 3 experts a token, .* has 3 and 3"),
        (_trace() + 1, "names experts from 1 to 8, .* a layer has 8"),
        (_trace() * 0, "or one twice"),
        (None, r"No such file or directory; give a trace of routing, \.npy"),
    ],
)
def test_a_trace_that_does_not_fit_is_one_line(shape: Path, trace: np.ndarray | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        _synthesize(shape, trace)
    assert not (shape / "out").exists()


def test_a_trace_is_for_slices_of_a_mixture(shape: Path) -> None:
    with pytest.raises(InputError, match="--routing is for slices"):
        _synthesize(shape, _trace(), kind="hf")
    (shape / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    with pytest.raises(InputError, match="has 2 and 0; make a trace for this shape"):
        _synthesize(shape, _trace())


def test_tokens_choose_experts_of_their_own(tpimpi: Cli, tmp_path: Path) -> None:
    """What a mixture's speed is measured with: where experts do not fit, every token must want others."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 12, "head_dim": 64, "num_attention_heads": 16}
    routed = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    shape, recorded = tmp_path / "config.json", tmp_path / "routing.npy"
    shape.write_text(json.dumps({"model_type": "qwen3_moe", **SMALL, **sizes, **routed}))
    assert (
        tpimpi("synth", "--shape", str(shape), "--ranks", "1", "--quiet", "--out", str(tmp_path / "slices")).code == 0
    )
    run = ("--slices", str(tmp_path / "slices"), "--raw", "--prompt", "7 7 7 7 7 7", "--ignore-eos", "--quiet")
    run += ("--max-tokens", "60", "--temperature", "1", "--seed", "1", "--record-routing", str(recorded))
    assert tpimpi(*run).code == 0
    trace = np.load(recorded)
    assert (trace.dtype, trace.shape) == (np.uint16, (65, 12, 2))  # the last token drawn is not computed
    used = sum(len(np.unique(trace[:, layer])) for layer in range(12))
    assert used > 0.6 * 12 * 32  # 60 uniform choices of 2 reach 0.98 of them; with norms around 1 it was 0.2
    assert tpimpi(*run).code == 0  # an earlier one of ours is written over
    np.testing.assert_array_equal(np.load(recorded), trace)
    np.save(recorded, trace.astype(np.int64))
    refused = tpimpi(*run)
    assert refused.code == 2 and "is there, and is no trace of routing of tpimpi" in refused.err


def test_made_traces_hit_as_was_measured() -> None:
    """67 % by an LRU of an eighth of a layer's experts, 81 % of a quarter; uniform ones as large a part as is in memory."""
    trace = make_trace(512, 10, 1, 1200, seed=0)
    for places, measured in ((64, 0.67), (128, 0.81)):
        assert hit_rate(trace, places, LeastRecentlyUsed()) == pytest.approx(measured, abs=0.03)
    uniform = make_trace(64, 4, 1, 1500, seed=0, kind="uniform")
    for policy in (LeastRecentlyUsed(), Stalest(1), FrequencyWithAging(1)):
        assert hit_rate(uniform, 16, policy) == pytest.approx(0.25, abs=0.05)
    same, cycle = (make_trace(16, 4, 2, 40, seed=0, kind=kind) for kind in ("same", "cycle"))
    assert hit_rate(same, 8, LeastRecentlyUsed()) == 1  # the first position, which misses, is not counted
    assert hit_rate(cycle, 2 * 12, LeastRecentlyUsed()) == 0  # each comes again when it has just gone
