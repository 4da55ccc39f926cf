"""A model that also sees images: its text part is read as a text model is, and what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.sources_cases import refusal
from tests.support.tiny_models import SMALL, TINY
from tpimpi.weights.sources import open_source


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny Gemma 3 with a vision tower as transformers saves it, and its text tensors by their canonical names."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text: dict[str, Any] = {**SMALL, **TINY["gemma3"][1], "vocab_size": 160}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    model = Gemma3ForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(folder)
    tensors = {name: value.numpy() for name, value in model.state_dict().items() if "language_model." in name}
    return folder, {name.split("language_model.")[1]: value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["as it is saved", "model.language_model.", "language_model.model."])
def test_the_text_part_is_what_transformers_has(saved, prefix: str, tmp_path: Path) -> None:
    folder, theirs = saved
    if prefix != "as it is saved":
        tensors = {}
        for name, values in load_file(folder / "model.safetensors").items():
            text = [
                name.removeprefix(p) for p in ("model.language_model.", "language_model.model.") if name.startswith(p)
            ]
            tensors[prefix + text[0] if text else name] = values
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        folder = tmp_path
    with open_source(folder) as source:
        assert source.config.architecture == "gemma3_text" and source.config.tied_head
        assert "images" in source.left_out
        assert set(source.tensors()) == set(theirs)
        for name in source.tensors():
            offset = np.float32(1 if name.endswith("norm.weight") else 0)
            np.testing.assert_array_equal(source.read(name), theirs[name] + offset, err_msg=name)


def test_what_is_not_known_is_refused_by_name(saved, tmp_path: Path) -> None:
    folder, _ = saved
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for change, words in (
        ({"audio_config": {"x": 1}}, "'audio_config'"),
        ({"text_config": None}, "text_config is None"),
        ({"text_config": {**values["text_config"], "model_type": "bert"}}, "'bert'"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        assert words in refusal(tmp_path)
