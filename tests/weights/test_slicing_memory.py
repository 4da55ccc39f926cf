"""Memory of slicing: no tensor is held whole, whatever the kind of model file."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.launch import run_command
from tests.support.tiny_models import write_tiny_hf
from tpimpi.weights.sources import open_source

MB = 1 << 20
BUFFERS_MB = 40  # a run of rows as stored and in other forms, and what the writer has; build.py says 32
LARGEST_MB = 80  # of a tensor, at least
MAX_ROWS = 65_536
HIDDEN = 2560

# The highest resident size, which a process does not take over from the one that started it as it does ru_maxrss.
PROGRAM = """
import sys
from pathlib import Path
from tpimpi.compute.backends import load_quantizer
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source
model, shares, fmt, out = sys.argv[1:]
with open_source(Path(model)) as source:
    plan = make_partition(source.config, [int(share) for share in shares.split(",")])
    slice_model(source, plan, choose_formats(source, fmt), Path(out), quantizer=load_quantizer(1))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_mb(model: Path, shares: str, fmt: str, out: Path) -> float:
    result = run_command([sys.executable, "-c", PROGRAM, str(model), shares, fmt, str(out)], env={})
    assert result.code == 0, result.err
    found = re.search(r"VmHWM:\s*(\d+) kB", result.out)
    assert found is not None, result.out
    return int(found[1]) / 1024


def write_gguf(folder: Path) -> Path:
    """A llama in q4_k in parts, whose table and MLP are large; its first part."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=4)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MAX_ROWS)
    writer.add_head_count(20)
    writer.add_head_count_kv(20)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", b"b"])
    shapes = {"token_embd": (MAX_ROWS, HIDDEN), "blk.0.ffn_down": (HIDDEN, MAX_ROWS)}
    shapes |= {f"blk.0.ffn_{name}": (MAX_ROWS, HIDDEN) for name in ("gate", "up")}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    for name, (rows, columns) in shapes.items():
        blocks = np.random.default_rng(rows).integers(0, 256, (rows, columns // 256, 144), np.uint8)
        blocks[..., :4] = np.full(2, 0.001, np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m-00001-of-00003.gguf"


def write_safetensors(folder: Path) -> Path:
    model = write_tiny_hf(
        folder / "m",
        "llama",
        vocab_size=340_000,
        intermediate_size=340_000,
        num_hidden_layers=1,
        tie_word_embeddings=True,
    )
    (model / "tokenizer.json").write_text("{}")
    return model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the highest resident size is read from Linux's /proc")
@pytest.mark.parametrize(
    ("write", "shares", "fmt"),
    [
        (write_gguf, "1", "auto"),
        (write_gguf, "3,2,1", "auto"),
        (write_safetensors, "1,1", "auto"),
        (write_safetensors, "1,1", "q4_k_m"),
    ],
)
def test_no_tensor_is_held_whole(
    write: Callable[[Path], Path], shares: str, fmt: str, tiny: Path, tmp_path: Path
) -> None:
    """Also of GGUF files in parts, and where columns are cut within blocks or weights are quantized."""
    model = write(tmp_path)
    with open_source(model) as source:
        rows = (source.read_blocks(name, slice(0, 1)).nbytes * info.shape[0] for name, info in source.tensors().items())
        assert max(rows) > LARGEST_MB * MB
    base = peak_mb(tiny, shares, fmt, tmp_path / "tiny slices")
    assert peak_mb(model, shares, fmt, tmp_path / "slices") < base + BUFFERS_MB
