"""A gpt-oss whose experts are pairs of MXFP4 blocks and scales, as it is published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]


def edit_config(directory: Path, **changes: object) -> None:
    """Change keys of a model's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_pairs(
    folder: Path, edit: Callable[[Tensors], None] = lambda tensors: None, *, scales: tuple[int, int] = (118, 126)
) -> Tensors:
    """Make the experts of a tiny gpt-oss such pairs, of random bytes, the scales 2^(n - 127) for n from the first to below
    the second; returns the tensors."""
    dice = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = dice.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = dice.integers(*scales, (experts, rows, columns // 32), np.uint8)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return tensors


def dequantized(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Each stack of experts by its name, as transformers decodes its pair: f32 [experts, in, out]."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for name in [name for name in tensors if name.endswith("_blocks")]:
        plain = name.removesuffix("_blocks")
        pair = (torch.from_numpy(tensors[f"{plain}_{kind}"]) for kind in ("blocks", "scales"))
        yield plain, convert_moe_packed_tensors(*pair, dtype=torch.float32).numpy()
