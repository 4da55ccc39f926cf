"""AirLLM in bf16 on the CPU: each layer's weights are loaded from a file of its own at its turn, the next one's ahead.

--prepare FOLDER: only split the model's files into one for each layer, in FOLDER; that is then the model to run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import airllm
import timed
import torch
from airllm.airllm_base import AirLLMBaseModel
from run_transformers import generator

WEIGHTS = (".safetensors", ".bin")


def main() -> None:
    AirLLMBaseModel.get_tokenizer = lambda self, hf_token=None: None  # it would insist on one, and works on ids
    if "--prepare" in sys.argv:
        preparing = argparse.ArgumentParser(description=__doc__)
        preparing.add_argument("--model", type=Path, required=True)
        preparing.add_argument("--prepare", type=Path, required=True)
        wanted = preparing.parse_args()
        prepare(wanted.model, wanted.prepare)
        return
    options = timed.parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    timed.report(lambda: generator(load(options.model).model), options, ("torch", "transformers", "airllm"))


def load(folder: Path) -> Any:
    return airllm.AutoModel.from_pretrained(str(folder), device="cpu")


def prepare(model: Path, folder: Path) -> None:
    """AirLLM splits what it loads, beside it: so links to the weights stand there, not the weights."""
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in WEIGHTS:
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)
    load(folder)


if __name__ == "__main__":
    main()
