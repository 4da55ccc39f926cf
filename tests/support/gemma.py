"""Gemma 3 270M in Q4_K_M: its file, prompts of several kinds, and what transformers computes of them in f32.

The oracle is transformers' Gemma3ForCausalLM with the published config, on the weights as the `gguf` package decodes
them. Its greedy ids take a minute or two, so they are in a golden file:

    python -m tests.support.gemma        # with the file of jobs/gemma.sh, and the tokenizer of real_tokenizers.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.support.launch import ROOT
from tests.support.real_tokenizers import FOLDER

if TYPE_CHECKING:
    import torch

MODEL = Path(sys.prefix) / "share" / "models" / "gemma-3-270m-q4_k_m.gguf"  # where jobs/gemma.sh puts it
GOLDEN = ROOT / "tests" / "support" / "gemma_greedy.json"
TOKENS = 24
CLOSE = 0.002  # two best logits nearer than this may change places when sums are ordered differently

ONE_LINE = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Am Morgen ging der alte Fischer zum Hafen und",
    "Le petit prince demanda au renard :",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "I love pizza 🍕 and ice cream 🍦, but most of all",
    "日本の首都は",
    "Вчера вечером мы пошли в театр, и",
    '{"name": "Alice", "age": 30, "city":',
    # Longer than the window of 512 positions that five of six layers have.
    " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())[:4400],
]
SEVERAL_LINES = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "<start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n",
]


class Greedy(NamedTuple):
    """The oracle's answer to a prompt."""

    prompt: str
    ids: list[int]  # of the prompt, BOS first
    made: list[int]  # the TOKENS likeliest ids, one after the other, whatever they mean
    gaps: list[float]  # at each, how far the two best logits are apart

    @property
    def certain(self) -> int:
        """How many of `made` come before the first where the two best are close."""
        return next((index for index, gap in enumerate(self.gaps) if gap < CLOSE), len(self.gaps))


def golden() -> list[Greedy]:
    """What the golden file has, in the order of ONE_LINE and SEVERAL_LINES."""
    answers = [Greedy(**answer) for answer in json.loads(GOLDEN.read_text(encoding="utf-8"))]
    assert [answer.prompt for answer in answers] == [*ONE_LINE, *SEVERAL_LINES], "make the golden file again"
    return answers


def oracle() -> torch.nn.Module:
    """transformers' model in f32 with the weights of MODEL. Takes 1.8 GB while it is made, then 1.1 GB."""
    import gguf
    import torch
    from gguf.quants import dequantize
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    published = json.loads((ROOT / "tests" / "support" / "published_configs.json").read_text())["google/gemma-3-270m"]
    config = Gemma3TextConfig(**{**published, "attn_implementation": "eager", "dtype": "float32"})
    model = Gemma3ForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    left = {tensor.name: tensor for tensor in gguf.GGUFReader(MODEL).tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = left.pop(f"{names.get_name(name.removesuffix('.weight'))}.weight")
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
            parameter.copy_(values.reshape(parameter.shape))
            if "norm" in tensor.name:  # GGUF has 1 + w, Hugging Face w
                parameter.sub_(1)
    assert not left, f"tensors that the oracle does not use: {sorted(left)}"
    return model


def _answer(model: torch.nn.Module, prompt: str, ids: list[int]) -> Greedy:
    import torch

    made, gaps, past, tokens = [], [], None, torch.tensor([ids])
    with torch.no_grad():
        for _ in range(TOKENS):
            out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            best = torch.topk(out.logits[0, -1], 2)
            past, tokens = out.past_key_values, best.indices[:1][None]
            made.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 5))
    return Greedy(prompt, ids, made, gaps)


def main() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "gemma3" / "tokenizer.json"))  # puts BOS first
    model = oracle()
    answers = []
    for prompt in [*ONE_LINE, *SEVERAL_LINES]:
        answers.append(_answer(model, prompt, tokenizer.encode(prompt).ids))
        made, gaps = answers[-1].made, answers[-1].gaps
        print(len(answers[-1].ids), min(gaps), repr(tokenizer.decode(made)))
    lines = [json.dumps(answer._asdict(), ensure_ascii=False) for answer in answers]
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
