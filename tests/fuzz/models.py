"""Files of a model: GGUF, whole and in parts, safetensors with config.json and index, and what a config makes."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from random import Random

from tests.fuzz import seeds
from tests.fuzz.mutate import files_in, joined, mutate_bytes, mutate_files, mutate_json
from tests.fuzz.target import Target, folder, written
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf, hf_mtp_layers, is_multimodal
from tpimpi.models.tensors import model_tensors
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import describe_model, open_source

_PARTS = 3
_MAX_RECORDS = 5000  # that are looked at: a config may promise any number, which no run would begin to make


def _open(path: Path) -> None:
    """All that `inspect` and a slicing read of a model, but for most of its numbers."""
    describe_model(path)
    with open_source(path) as source:
        source.tokenizer_assets()
        source.tokenizer_bytes()
        for name, tensor in source.tensors().items():
            source.read_blocks(name, slice(0, 1))
            source.read(name, slice(tensor.shape[0] - 1, None))
        source.fingerprint()
        _make(source.config)


def _make(config: ModelConfig) -> None:
    """What is made of a config before a tensor is read."""
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if config.layers > 64 or config.experts > 512:
        return  # as many tensors as it says there are, which files would have to hold
    model_tensors(config)
    partition, formats = make_partition(config, [2.0, 1.0]), ModelFormats.for_model("q4_0", config)
    for rank, share in enumerate(partition.shares):
        for record in itertools.islice(slice_records(config, share, rank, formats, {}), _MAX_RECORDS):
            assert record.nbytes >= 0


def _gguf(data: bytes) -> None:
    _open(written("gguf/m.gguf", data))


def _gguf_parts(data: bytes) -> None:
    for number, part in enumerate(files_in(data, _PARTS), start=1):
        written(f"parts/m-{number:05}-of-{_PARTS:05}.gguf", part)
    _open(folder() / "parts")


def _split_seeds() -> list[bytes]:
    """A file cut into three, which all have keys of the split."""
    import gguf
    import numpy as np

    from tests.support.sources_cases import F32

    path = folder() / "seeds" / "split"
    path.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path / "m.gguf", "llama", split_max_tensors=4)
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    writer.add_token_list([b"a", b"b"])
    vectors = {"output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,)}
    matrices = {"token_embd.weight": (8, 32), "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32)}
    square = ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name, shape in {**vectors, **matrices, **{f"blk.0.{one}.weight": (32, 32) for one in square}}.items():
        writer.add_tensor(name, np.zeros(shape, np.float32), raw_dtype=F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [joined([part.read_bytes() for part in sorted(path.glob("*.gguf"))][:_PARTS])]


def _mutate_gguf(data: bytes, random: Random) -> bytes:
    """Mostly in the header; a key or tensor that is there becomes another one of these, or a number of it an odd one."""
    end = min(len(data), 4096)
    head, rest = data[:end], data[end:]
    if random.randrange(3) == 0:  # a length, a count or an offset
        at = random.randrange(max(1, end - 8))
        value = random.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), random.randrange(1 << 16)))
        return data[:at] + struct.pack("<Q", value) + data[at + 8 :]
    return mutate_bytes(head, random) + rest


def _safetensors(data: bytes) -> None:
    config, index, one, other = files_in(data, 4)
    path = written("hf/config.json", config).parent
    for name in ("model.safetensors", "model.safetensors.index.json", "a.safetensors", "b.safetensors"):
        (path / name).unlink(missing_ok=True)
    if index:
        written("hf/model.safetensors.index.json", index)
        written("hf/a.safetensors", one)
        written("hf/b.safetensors", other)
    else:
        written("hf/model.safetensors", one)
    _open(path)


def _safetensors_seeds() -> list[bytes]:
    found = []
    for kind in seeds.KINDS:
        path = seeds.hf_folder(kind)
        config, weights = (path / "config.json").read_bytes(), next(path.glob("*.safetensors")).read_bytes()
        found.append(joined([config, b"", weights, b""]))
        (length,) = struct.unpack("<Q", weights[:8])
        names = [name for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")})
        found.append(joined([config, index.encode(), weights, b""]))
    return found


def _mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Its JSON header is another, with the length that it has; or any bytes."""
    if len(data) < 8 or random.randrange(4) == 0:
        return mutate_bytes(data, random)
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data):
        return mutate_bytes(data, random)
    header = mutate_json(data[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _config(data: bytes) -> None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    config = config_from_hf(values, "config.json")
    hf_mtp_layers(values, "config.json")
    is_multimodal(values)
    _make(config)


def _config_seeds() -> list[bytes]:
    published = Path(__file__).parent.parent / "support" / "published_configs.json"
    return [json.dumps(values).encode() for values in json.loads(published.read_text()).values()]


TARGETS = [
    Target("gguf", _gguf, lambda: [seeds.gguf_file(kind) for kind in seeds.KINDS], _mutate_gguf),
    Target("gguf-parts", _gguf_parts, _split_seeds, mutate_files(*[_mutate_gguf] * _PARTS)),
    Target(
        "safetensors",
        _safetensors,
        _safetensors_seeds,
        mutate_files(mutate_json, mutate_json, _mutate_safetensors, _mutate_safetensors),
    ),
    Target("config", _config, _config_seeds, mutate_json),
]
