"""What anybody has: the model's files, and the mathematics of this program."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.backends import Backend, load_backend
from tpimpi.compute.formats.packed import decode, encode, row_bytes
from tpimpi.models.blocks import Block, layer_blocks
from tpimpi.models.layers.head import scaled_logits
from tpimpi.models.layers.norms import pre_norm
from tpimpi.models.tensors import EMBEDDING_NAME, HEAD_NAME, NORM_NAME, model_tensors
from tpimpi.serving.text.load import tokenizer_of_slices
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.star.codec import wire_of
from tpimpi.weights.sources import open_source


class PublicModel:
    """A model's embedding table, output norm and head, norms after blocks, and tokenizer.

    Memory: the embedding table and the head in f32. Raises ModelError.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with open_source(path) as source:
            self.config = config = source.config
            # Where a family scales the embedding (Gemma, Granite), the vectors that leave rank 0 are scaled.
            self.table: F32 = source.read(EMBEDDING_NAME) * np.float32(config.embedding_scale)  # [vocab, hidden]
            self.head: F32 = source.read(EMBEDDING_NAME if config.tied_head else HEAD_NAME)  # [vocab, hidden]
            self.norm: F32 = source.read(NORM_NAME)
            self._post_norms = {
                (tensor.part, tensor.layer): source.read(name)
                for name, tensor in model_tensors(config).items()
                if tensor.part in ("attn_post_norm", "mlp_post_norm")
            }
            self._assets = source.tokenizer_assets()
        self._backend: Backend = load_backend("numpy", 1)

    @property
    def summed_blocks(self) -> list[Block]:
        """The blocks after which ranks add their partials, in order."""
        config = self.config
        blocks = [block for layer in range(config.layers) for block in layer_blocks(config, layer)]
        return [block for block in blocks if not (config.layer(block.layer).parallel and block.kind == "attn")]

    def to_residual(self, total: F32, block: Block) -> F32:
        """What the sum of a block [n, hidden] adds to the residual."""
        spec = self.config.layer(block.layer)
        if spec.post_norms:
            weight = self._post_norms[f"{block.kind}_post_norm", block.layer]
            total = self._backend.fixed_rms_norm(total, weight, self.config.norm_eps)
        return total * np.float32(spec.residual_scale)

    def logits(self, x: F32) -> F32:
        """Of residuals after the last layer, [n, hidden]: [n, vocab]."""
        config = self.config
        normed = pre_norm(self._backend, config.norm, x, self.norm, config.norm_eps)
        return scaled_logits(normed @ self.head.T, config.logit_scale, config.logit_softcap)

    def table_on_the_wire(self, wire: str) -> Bytes:
        """The rows of the embedding table as `--wire` sends them: uint8 [vocab, bytes a row]."""
        return encode(self.table, wire, wire_of(wire).quantizer)

    def row_bytes(self, wire: str) -> int:
        """Bytes of a hidden vector on the wire."""
        return row_bytes(wire, self.config.hidden)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | TokenIds:
        """Raises ModelError where there is none that can be used."""
        return tokenizer_of_slices(self._assets, self.config.vocab)

    def text(self, ids: Iterable[int]) -> str:
        """The tokens' text."""
        stream = self.tokenizer.stream()
        return "".join(map(stream.push, ids)) + stream.flush()


def numbers(data: bytes, wire: str) -> F32:
    """What the bytes of a message say in the format of `--wire`: [n]. Bytes that are no whole block of 32 are left out."""
    block = row_bytes(wire, 32)
    blocks = len(data) // block
    stored = np.frombuffer(data, np.uint8, blocks * block)
    return decode(stored.reshape(1, -1), wire, blocks * 32).reshape(-1)
