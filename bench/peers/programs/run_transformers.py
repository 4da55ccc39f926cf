"""Hugging Face transformers in bf16: all weights mapped from the file, as from_pretrained leaves them, or in other places.

--offload BYTES: by accelerate; BYTES is the memory that the process may take. What is left of it beside the program, the
cache and one layer is filled with weights, and the others are read from the checkpoint's own safetensors for each token.
0: all are read. --copy: those that are not read for each token in memory of the process's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timed
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

RESERVE = 256 << 20  # bytes for activations, and what loading takes for a moment


def main() -> None:
    parser = timed.parser(__doc__)
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--offload", type=int, metavar="BYTES")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    placed: dict[str, int] = {}

    def load() -> timed.Generate:
        placement = {} if options.offload is None else place(options.model, options.offload, options.context)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, **placement)
        model.eval()  # type: ignore[no-untyped-call]
        if options.copy:
            copy(model)
        parts = getattr(model, "hf_device_map", {"": "cpu"}).values()
        placed.update({where: sum(str(part) == where for part in parts) for where in ("cpu", "disk")})
        return generator(model)

    names = ("torch", "transformers", *(() if options.offload is None else ("accelerate",)))
    timed.report(load, options, names, placed=placed)


def copy(model: Any) -> None:
    """Have the parameters that are on the CPU in memory of the process's own; those on the disk are of the device "meta"."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def place(folder: Path, memory: int, context: int) -> dict[str, Any]:
    """How from_pretrained is told where weights go; `memory` in bytes."""
    if memory == 0:
        return {"device_map": {"": "disk"}}
    config = AutoConfig.from_pretrained(folder)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * heads * width * context  # keys and values of 2 bytes
    # accelerate itself keeps room for the largest layer that it offloads.
    room = memory - timed.anonymous() - cache - RESERVE
    if room <= 0:
        return {"device_map": {"": "disk"}}
    return {"device_map": "auto", "max_memory": {"cpu": room}}


def generator(model: Any) -> timed.Generate:
    """A plain greedy loop: what generate() does besides would only cost time."""

    def generate(prompt: Sequence[int], tokens: int, on_token: Callable[[int], None]) -> None:
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([list(prompt)])
        for _ in range(tokens):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            on_token(int(ids))

    return generate


if __name__ == "__main__":
    main()
