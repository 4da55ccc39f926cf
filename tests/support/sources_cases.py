"""What tests of sources share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tpimpi.errors import ModelError
from tpimpi.weights.sources import open_source


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_source(path).close()
    message = str(caught.value)
    assert "\n" not in message
    return message


def fingerprint(path: Path) -> str:
    with open_source(path) as source:
        return source.fingerprint()


Q8_0 = gguf.GGMLQuantizationType.Q8_0


F32 = gguf.GGMLQuantizationType.F32


HEADS, KV_HEADS, HEAD = 4, 2, 16


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_tensors(arch: str, bias: bool = False) -> dict[str, np.ndarray]:
    """Random tensors by their GGUF names, as Hugging Face orders the rows."""
    dice = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return dice.normal(size=shape).astype(np.float32)

    tensors = {"token_embd.weight": some(160, 64), "output_norm.weight": some(64), "output.weight": some(160, 64)}
    for layer in range(2):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (64,),
            "attn_q.weight": (HEADS * HEAD, 64),
            "attn_k.weight": (KV_HEADS * HEAD, 64),
            "attn_v.weight": (KV_HEADS * HEAD, 64),
            "attn_output.weight": (64, HEADS * HEAD),
            "ffn_norm.weight": (64,),
            "ffn_gate.weight": (96, 64),
            "ffn_up.weight": (96, 64),
            "ffn_down.weight": (64, 96),
        }
        if bias or arch == "qwen2":
            shapes |= {f"attn_{part}.bias": shapes[f"attn_{part}.weight"][:1] for part in "qkv"}
        if arch == "qwen3":
            shapes |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        tensors |= {f"blk.{layer}.{name}": some(*shape) for name, shape in shapes.items()}
    return tensors


def write_tiny_gguf(
    path: Path,
    arch: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = Q8_0,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **splitting: Any,
) -> Path:
    """A GGUF file of `tensors` (rows in Hugging Face's order), matrices quantized to `kind`.

    With the writer's options of `splitting`, several files, named as it names them.
    """
    writer = gguf.GGUFWriter(path, arch, endianess=endianess, **splitting)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", "\u00e9".encode(), b"\xff"])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_add_bos_token(True)
    edit(writer)
    for name, values in (gguf_tensors(arch) if tensors is None else tensors).items():
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            rows = permute(values, HEADS if "attn_q." in name else KV_HEADS)
        else:
            rows = values
        stored = F32 if values.ndim == 1 else kind
        data = rows if stored == F32 else gguf.quants.quantize(rows, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def state_dict(directory: Path) -> dict[str, np.ndarray]:
    """What transformers loads, by canonical names, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return {name.removeprefix("model."): value.float().numpy() for name, value in model.state_dict().items()}


def edit_tensors(directory: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
