"""What a model family is: its names, its tensors, and how its config.json and its GGUF metadata are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tpimpi.models.keys import Keys

# A size of a tensor, as a number of the config: "queries" is heads * head_dim, "keys" is kv_heads * head_dim.
Dimension = Literal["hidden", "intermediate", "queries", "keys", "head_dim", "vocab"]
# The field of ModelConfig that says whether a matrix has a bias.
BiasFlag = Literal["qkv_bias", "o_bias", "mlp_bias"]
Windows = Callable[[Keys, int], tuple[int, ...]]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a layer, or of the model beside its layers.

    `part` is its name in tiles and slices. `hf` and `gguf` are its names in Hugging Face and GGUF files, without
    "model.layers.N." or "blk.N." before and ".weight" or ".bias" behind. `shape` is [out, in] of a matrix, [out] of a norm.
    """

    part: str
    hf: str
    gguf: str
    shape: tuple[Dimension, ...]
    bias: BiasFlag | None = None  # None: never one


EMBEDDING = TensorSpec("embedding", "embed_tokens", "token_embd", ("vocab", "hidden"))
OUTPUT_NORM = TensorSpec("norm", "norm", "output_norm", ("hidden",))
HEAD = TensorSpec("head", "lm_head", "output", ("vocab", "hidden"))  # not there where the head is the embedding table

ATTENTION_NORM = TensorSpec("attn_norm", "input_layernorm", "attn_norm", ("hidden",))
ATTENTION = (
    TensorSpec("q", "self_attn.q_proj", "attn_q", ("queries", "hidden"), "qkv_bias"),
    TensorSpec("k", "self_attn.k_proj", "attn_k", ("keys", "hidden"), "qkv_bias"),
    TensorSpec("v", "self_attn.v_proj", "attn_v", ("keys", "hidden"), "qkv_bias"),
    TensorSpec("o", "self_attn.o_proj", "attn_output", ("hidden", "queries"), "o_bias"),
)
QK_NORM = (
    TensorSpec("q_norm", "self_attn.q_norm", "attn_q_norm", ("head_dim",)),
    TensorSpec("k_norm", "self_attn.k_norm", "attn_k_norm", ("head_dim",)),
)
MLP_NORM = TensorSpec("mlp_norm", "post_attention_layernorm", "ffn_norm", ("hidden",))
MLP = (
    TensorSpec("gate", "mlp.gate_proj", "ffn_gate", ("intermediate", "hidden"), "mlp_bias"),
    TensorSpec("up", "mlp.up_proj", "ffn_up", ("intermediate", "hidden"), "mlp_bias"),
    TensorSpec("down", "mlp.down_proj", "ffn_down", ("hidden", "intermediate"), "mlp_bias"),
)


def no_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """Every layer sees all positions, whatever config.json holds."""
    return (0,) * layers


@dataclass(frozen=True)
class Architecture:
    """A family of models. One more is one more module like llama.py, and its line in the registry (`ARCHITECTURES`)."""

    name: str  # ModelConfig.architecture; model_type in config.json
    hf_class: str  # in config.json's `architectures`
    gguf_name: str  # general.architecture in GGUF
    layer: tuple[TensorSpec, ...]  # every tensor of a layer, in the order in which messages and files of ours have them
    always_qkv_bias: bool = (
        False  # whatever the files say; else config.json's attention_bias, or what a GGUF file holds
    )

    # config.json: the keys beside those that all families have, and what transformers takes where one is missing.
    hf_keys: frozenset[str] = frozenset()
    hf_context: int = 2048
    hf_kv_heads: int | None = None  # None: as many as query heads
    hf_head_dim: int | None = None  # None: hidden / heads
    hf_windows: Windows = no_windows  # its keys and the number of layers -> attention_windows

    # GGUF: whether rows of Q and K are interleaved within each head, and whether one window holds for every layer.
    gguf_interleaves_qk: bool = False
    gguf_has_windows: bool = False

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed, head by head."""
        return any(tensor.part == "q_norm" for tensor in self.layer)
