"""The model across ranks against transformers, for every architecture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.gguf_models import write_gguf_of
from tests.support.launch import PROGRAMS
from tests.support.mxfp4_pairs import dequantized, with_pairs
from tests.support.ranks import Ranks
from tests.support.slices import joined
from tests.support.tiny_models import TINY, write_tiny_hf
from tpimpi.star import ALGORITHMS, WIRES
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

POSITIONS = 40
CHUNKS = [17, 16, 1, 1, 1, 1, 1, 1, 1]  # a long prompt in parts, then tokens one by one
TOLERANCE = 2e-4

# kind of tiny model, ranks or shares -> beyond the 1, 2 and 3 equal ranks that every kind gets
MORE = {
    4: [("smollm", [4, 2, 2, 1]), ("llama-bias", [1, 1, 1, 1])],
    5: [(kind, [1] * 5) for kind in ("mixtral", "qwen3-moe", "gpt-oss", "olmoe", "granite-moe", "glm4-moe")],
    7: [("mqa", [1] * 7), ("llama-odd", [1] * 7), ("qwen3", [5, 1, 1, 1, 1, 0, 1]), ("cohere2", [5, 1, 1, 1, 1, 0, 1])],
}
MIXTURES = (
    "qwen3-moe",
    "qwen3-moe-all",
    "mixtral",
    "gpt-oss",
    "gpt-oss-limit",
    "olmoe",
    "granite-moe",
    "glm4-moe",
    "glm4-moe-bare",
)
# Those of which a GGUF file can say all.
GGUF_KINDS = (
    *("llama", "llama-yarn", "qwen3", "ministral3", "gemma2", "gemma3", "phi3", "phi3-long", "granite", "smollm3"),
    *("olmo2", "olmo3", "glm", "glm-edge", "glm4", "exaone4", "exaone4-full", "cohere2", "granite4", "granite4-nope"),
    *("qwen3-moe-all", "mixtral", "gpt-oss", "olmoe", "granite-moe", "glm4-moe", "glm4-moe-bare"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int], np.ndarray]]:
    """For each kind: its directory, token ids, and transformers' logits at every position, [positions, vocab]."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    made = {}
    for kind in TINY:
        sharding = {"max_shard_size": "60KB"} if kind == "yi" else {}
        path = write_tiny_hf(folder / kind, kind, **sharding)
        (path / "tokenizer.json").write_text("{}")  # sliced along, not read here
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        ids = np.random.default_rng(0).integers(3, model.config.vocab_size, POSITIONS).tolist()
        with torch.no_grad():
            made[kind] = (path, ids, model(torch.tensor([ids])).logits[0].numpy())
    assert (folder / "yi" / "model.safetensors.index.json").exists(), "the sharded model is not sharded"
    return made


def _run(on_ranks: Ranks, ranks: int, jobs: list[dict[str, object]], folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = on_ranks(ranks, str(PROGRAMS / "logits.py"), str(folder / "jobs.json"), str(folder))
    assert result.code == 0, result.err


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7])
@pytest.mark.slow_but("3")
@pytest.mark.any_mpi  # sums: tests/star; logits of one model: test_a_long_chunk_in_halves_gives_the_logits_of_transformers
def test_logits_are_those_of_transformers(on_ranks: Ranks, models, ranks: int, tmp_path: Path) -> None:
    wanted = MORE.get(ranks) or [(kind, [1] * ranks) for kind in TINY]
    jobs = []
    for kind, weights in wanted:
        path, ids, _ = models[kind]
        with open_source(path) as source:
            slice_model(source, make_partition(source.config, weights), choose_formats(source, "f32"), tmp_path / kind)
        jobs.append({"name": kind, "slices": str(tmp_path / kind), "ids": ids, "chunks": CHUNKS})
        if ranks == 1:  # our own kernels, and what a GGUF file of the model says
            jobs.append({**jobs[-1], "name": f"{kind}@native", "backend": "native"})
            if kind in GGUF_KINDS:
                for name in (f"{kind}@gguf", *(["glm@gguf-fused"] if kind == "glm" else [])):
                    folder = tmp_path / name
                    file = write_gguf_of(path, tmp_path / f"{name}.gguf", fused="fused" in name)
                    with open_source(file) as source:
                        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), folder)
                    jobs.append({**jobs[-1], "name": name, "slices": str(folder), "backend": "torch"})
        if ranks == 2:  # the other backend, and a window that streams
            jobs.append({**jobs[-1], "name": f"{kind}@numpy", "backend": "numpy", "window": 2})
        if kind in MIXTURES:  # with room for two experts, for some, and for all
            for pins in (0, 0.4, 1):
                jobs.append({**jobs[-1], "name": f"{kind}@native{pins}", "backend": "native", "pins": pins})
    _run(on_ranks, ranks, jobs, tmp_path)
    for kind in MIXTURES:  # which experts are in memory changes no bit
        with_room = [str(job["name"]) for job in jobs if job["slices"] == str(tmp_path / kind) and "pins" in job]
        assert len({(tmp_path / f"{name}.npy").read_bytes() for name in with_room}) <= 1
    for job in jobs:
        name = str(job["name"])
        expected = models[name.split("@", maxsplit=1)[0]][2]
        found = np.load(tmp_path / f"{name}.npy")
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < TOLERANCE, name
        digests = {(tmp_path / f"{name}-rank{rank}.txt").read_text() for rank in range(ranks)}
        assert len(digests) == 1, f"{name}: hidden vectors differ between ranks"


@pytest.mark.any_mpi
def test_bf16_slices_compute_with_rounded_weights(on_ranks: Ranks, models, tmp_path: Path) -> None:
    """The oracle is transformers in f32 on weights that torch rounded to bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    path, ids, exact = models["llama-3.1"]
    with open_source(path) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "bf16"), tmp_path / "slices")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("norm.weight"):
                parameter.copy_(parameter.to(torch.bfloat16).float())
        expected = model(torch.tensor([ids])).logits[0].numpy()
    job = {"slices": str(tmp_path / "slices"), "ids": ids, "chunks": CHUNKS}
    _run(on_ranks, 2, [{**job, "name": kv, "kv": kv} for kv in ("auto", "f16", "f32")], tmp_path)
    found = np.load(tmp_path / "f32.npy")
    assert np.abs(found - expected).max() < TOLERANCE
    # The cache is f16 unless it is asked for in f32: keys and values keep 11 bits.
    np.testing.assert_array_equal(np.load(tmp_path / "auto.npy"), np.load(tmp_path / "f16.npy"))
    assert 2 * TOLERANCE < np.abs(np.load(tmp_path / "f16.npy") - expected).max() < 0.01
    assert np.abs(found - exact).max() > 10 * TOLERANCE, "nothing was rounded: the test shows nothing"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.any_mpi
def test_a_gpt_oss_of_blocks_and_scales_gives_the_logits_of_transformers(
    on_ranks: Ranks, ranks: int, tmp_path: Path
) -> None:
    """As it is published: experts as pairs in MXFP4. The oracle is transformers in f32 on what it decodes these to; slices
    keep the blocks (the torch backend computes with their numbers), or hold their numbers as f32 (our kernels)."""
    import torch
    from transformers import AutoModelForCausalLM

    path = write_tiny_hf(tmp_path / "m", "gpt-oss")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    (path / "tokenizer.json").write_text("{}")
    pairs = with_pairs(path, scales=(122, 125))
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, POSITIONS).tolist()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0].numpy()
        for name, stack in dequantized(pairs):
            parameters[name].copy_(torch.from_numpy(stack))
        expected = model(torch.tensor([ids])).logits[0].numpy()
    jobs = []
    for fmt, backend in (("auto", "torch"), ("f32", "native")):
        with open_source(path) as source:
            formats = choose_formats(source, fmt)
            slice_model(source, make_partition(source.config, [1] * ranks), formats, tmp_path / fmt)
        assert {layer.expert_down for layer in formats.layers} == {"mxfp4" if fmt == "auto" else "f32"}
        job = {"slices": str(tmp_path / fmt), "ids": ids, "chunks": CHUNKS, "kv": "f32", "backend": backend}
        jobs.append({**job, "name": fmt, "pins": 0.4})
    _run(on_ranks, ranks, jobs, tmp_path)
    for fmt in ("auto", "f32"):
        assert np.abs(np.load(tmp_path / f"{fmt}.npy") - expected).max() < TOLERANCE, fmt
    assert np.abs(plain - expected).max() > 100 * TOLERANCE, "the pairs change nothing: the test shows nothing"


HF_NAMES = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_1"])
@pytest.mark.slow_but("q4_1")
def test_quantized_slices_compute_with_their_own_numbers(on_ranks: Ranks, models, fmt: str, tmp_path: Path) -> None:
    """The oracle is transformers in f32 on the numbers that the slices hold; widths of 70, 90 and 20 fill no blocks."""
    import torch
    from transformers import AutoModelForCausalLM

    path, ids, exact = models["llama-odd"]
    with open_source(path) as source:
        slice_model(source, make_partition(source.config, [2, 1, 1]), choose_formats(source, fmt), tmp_path / "slices")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, numbers in joined(tmp_path / "slices", 3).items():
            if name.startswith("blk."):
                _, layer, part = name.split(".")
                spelled = f"model.layers.{layer}.{HF_NAMES[part]}.weight"
            else:
                spelled = {"token_embd": "model.embed_tokens.weight", "output": "lm_head.weight"}[name]
            parameters.pop(spelled).copy_(torch.from_numpy(numbers))
        assert all(parameter.dim() == 1 for parameter in parameters.values()), "a matrix is in no tile"
        expected = model(torch.tensor([ids])).logits[0].numpy()
    job = {"slices": str(tmp_path / "slices"), "ids": ids, "chunks": CHUNKS, "kv": "f32"}
    _run(on_ranks, 3, [{**job, "name": name, "backend": name} for name in ("torch", "numpy")], tmp_path)
    found = np.load(tmp_path / "torch.npy")
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(found - exact).max() > 10 * TOLERANCE, "nothing was rounded: the test shows nothing"
    # The twin's activations are quantized too, to int8.
    error = np.abs(np.load(tmp_path / "numpy.npy") - expected).max()
    assert 10 * TOLERANCE < error < 0.1 * np.ptp(expected)


def test_ranks_of_mixed_processors_choose_the_same_experts(on_ranks: Ranks, models, tmp_path: Path) -> None:
    """The residual has the same bits on every rank, whatever level its kernels are of, over every allreduce and wire: a rank
    that chose other experts would add nonsense. Nor does a bit depend on how many experts are read ahead."""
    from tpimpi.compute.backends.native import levels

    path, ids, expected = models["qwen3-moe"]
    with open_source(path) as source:
        slice_model(source, make_partition(source.config, [1] * 3), choose_formats(source, "f32"), tmp_path / "s")
    kernels = ["portable", levels()[0], levels()[len(levels()) // 2]]
    job = {
        "slices": str(tmp_path / "s"),
        "ids": ids,
        "chunks": CHUNKS,
        "backend": "native",
        "kernels": kernels,
        "pins": 0,
    }
    ways = [{"allreduce": name, "wire": wire} for name in ALGORITHMS if name != "library" for wire in WIRES]
    ways += [{"predict": count} for count in (0, 1, 8)]
    jobs = [{**job, **way, "name": f"way-{number}"} for number, way in enumerate(ways)]
    _run(on_ranks, 3, jobs, tmp_path)
    for number, way in enumerate(ways):
        digests = {(tmp_path / f"way-{number}-rank{rank}.txt").read_text() for rank in range(3)}
        assert len(digests) == 1, f"{way}: hidden vectors differ between ranks"
        found = np.load(tmp_path / f"way-{number}.npy")
        if way.get("wire", "f32") == "f32":
            assert np.abs(found - expected).max() < TOLERANCE, way
    assert len({(tmp_path / f"way-{number}.npy").read_bytes() for number in range(len(ways) - 3, len(ways))}) == 1


def test_a_rank_that_chooses_other_experts_ends_the_run(on_ranks: Ranks, models, tmp_path: Path) -> None:
    """With the next step at the latest, and not as text without sense."""
    with open_source(models["qwen3-moe"][0]) as source:
        slice_model(source, make_partition(source.config, [1] * 2), choose_formats(source, "f32"), tmp_path / "s")
    result = on_ranks(2, str(PROGRAMS / "choices.py"), str(tmp_path / "s"))
    assert (result.code, result.out.split("\n")[0]) == (0, "all well"), result.err


@pytest.mark.parametrize("kind", ["gemma3", "phi3-long", "qwen3-moe"])
@pytest.mark.slow_but("gemma3")
def test_a_sequence_goes_on_from_the_positions_of_the_one_before(
    on_ranks: Ranks, models, kind: str, tmp_path: Path
) -> None:
    """To the bit, in more room or less; but where the context says other rotary angles nothing is kept."""
    with open_source(models[kind][0]) as source:
        slice_model(source, make_partition(source.config, [1] * 2), choose_formats(source, "f32"), tmp_path / "s")
    others_from = "33" if kind == "phi3-long" else "0"
    result = on_ranks(2, str(PROGRAMS / "kept.py"), str(tmp_path / "s"), others_from)
    assert (result.code, result.out.split("\n")[0]) == (0, "all well"), result.err


@pytest.mark.parametrize("kind", ["gemma3", "gpt-oss"])
@pytest.mark.slow_but("gemma3")
def test_windowed_layers_of_a_long_sequence_have_fewer_pages(on_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """And give the numbers of all pages, to the bit, also where the sequence goes back, or on in another run."""
    with open_source(write_tiny_hf(tmp_path / "model", kind, max_position_embeddings=2048)) as source:
        slice_model(source, make_partition(source.config, [1] * 2), choose_formats(source, "f32"), tmp_path / "s")
    result = on_ranks(2, str(PROGRAMS / "windows.py"), str(tmp_path / "s"), str(tmp_path))
    assert (result.code, result.out.split("\n")[0]) == (0, "all well"), result.err


@pytest.mark.parametrize(
    ("kind", "kv", "ranks"),
    [("gemma3", "f32", 2), ("gpt-oss", "auto", 2), ("llama", "f16", 3), ("olmo3", "f32", 1), ("qwen3-moe", "f32", 2)],
)
@pytest.mark.slow_but("gemma3-f32-2")
def test_a_batch_gives_every_sequence_its_numbers_alone(
    on_ranks: Ranks, models, kind: str, kv: str, ranks: int, tmp_path: Path
) -> None:
    """To the bit, wherever their pages are: of sequences that come, go, share their beginning, and go back."""
    with open_source(models[kind][0]) as source:
        slice_model(source, make_partition(source.config, [1] * ranks), choose_formats(source, "f32"), tmp_path / "s")
    for seed, memory in (("1", "all"), ("2", "bounded")):  # the second: pinned tiles give way to pages, and come back
        result = on_ranks(ranks, str(PROGRAMS / "batches.py"), str(tmp_path / "s"), seed, kv, memory)
        assert (result.code, result.out[:8]) == (0, "all well"), result.err
