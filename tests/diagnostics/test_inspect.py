"""`inspect` calls nothing whole that a run would refuse, and shows what stands in files as it is."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.support.slices import forged
from tests.support.sources_cases import gguf_tensors, write_tiny_gguf
from tests.support.tiny_models import write_tiny_hf
from tpimpi.diagnostics.inspect import inspect
from tpimpi.errors import InputError, ModelError, SliceError
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(tmp_path_factory.mktemp("inspecting") / "model", "llama")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def make(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a set of slices in a folder of its own."""

    def made(*, shares: tuple[float, ...] = (1, 1), fmt: str = "f32", of: Path = model) -> Path:
        folder = tmp_path_factory.mktemp("set")
        with open_source(of) as source:
            slice_model(source, make_partition(source.config, shares), choose_formats(source, fmt), folder)
        return folder

    return made


def test_a_whole_set_is_whole(make: Callable[..., Path], capsys) -> None:
    folder = make(shares=(2, 1, 1))
    inspect(folder, verify=True)
    assert capsys.readouterr().out.count("whole, every byte checked") == 3
    shutil.copy(folder / slice_name(1, 3), folder / "copy.h5")
    inspect(folder / "copy.h5", verify=False)
    assert "whole" in capsys.readouterr().out


def test_two_whole_sets_in_one_folder_are_whole(make: Callable[..., Path]) -> None:
    folder = make()
    for path in make(shares=(2, 1, 1), fmt="bf16").iterdir():
        shutil.copy(path, folder)
    inspect(folder, verify=False)


def test_swapped_files_are_not_whole(make: Callable[..., Path], capsys) -> None:
    folder = make()
    first, second, spare = folder / slice_name(0, 2), folder / slice_name(1, 2), folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    for path in (folder, first):
        with pytest.raises(
            SliceError, match=r"rank-0-of-2\.h5 is of rank 1 of 2, its name says otherwise; name it rank-1"
        ):
            inspect(path, verify=False)
        shown = capsys.readouterr().out
        assert "misnamed" in shown
        assert "whole" not in shown


@pytest.mark.parametrize("name", ["rank-0-of-0.h5", "rank-0-of-99999999999.h5", "rank-2-of-2.h5", "rank-01-of-2.h5"])
def test_a_name_that_no_slice_has_is_not_whole(make: Callable[..., Path], name: str, capsys) -> None:
    folder = make()
    shutil.copy(folder / slice_name(0, 2), folder / name)
    for path in (folder, folder / name):
        with pytest.raises(SliceError, match=f"{name} is of rank 0 of 2, its name says otherwise"):
            inspect(path, verify=False)
    assert "misnamed" in capsys.readouterr().out


def test_many_missing_ranks_are_counted_not_listed(make: Callable[..., Path]) -> None:
    folder = make(shares=(1,) * 40)
    for rank in range(1, 40):
        (folder / slice_name(rank, 40)).unlink()
    with pytest.raises(SliceError, match=r"lacks rank-1-of-40\.h5, .*, rank-8-of-40\.h5 and 31 more; make") as seen:
        inspect(folder, verify=False)
    assert "rank-9-of-40" not in str(seen.value)


def test_members_of_different_sets_are_not_whole(make: Callable[..., Path], tmp_path: Path, model: Path) -> None:
    folder = make()
    other = write_tiny_hf(tmp_path / "other", "llama", seed=1)
    (other / "tokenizer.json").write_text("{}")
    for another, what in (
        (make(shares=(2, 1)), "shares 2,1, not 1,1 as"),
        (make(fmt="bf16"), "format bf16, not f32 as"),
        (make(of=other), "fingerprint '[0-9a-f]{32}', not '[0-9a-f]{32}' as"),
    ):
        shutil.copy(another / slice_name(1, 2), folder)
        with pytest.raises(SliceError, match=rf"rank-1-of-2\.h5 has {what} rank-0-of-2\.h5; use slices that were made"):
            inspect(folder, verify=True)


def test_a_directory_among_the_slices_is_said(make: Callable[..., Path]) -> None:
    folder = make()
    (folder / slice_name(1, 2)).unlink()
    (folder / slice_name(1, 2)).mkdir()
    with pytest.raises(SliceError, match=r"rank-1-of-2\.h5 is a directory where a slice file is needed"):
        inspect(folder, verify=False)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch) -> None:
    for path in (tmp_path / ("x" * 5000), tmp_path / ("x" * 5000 + ".h5")):
        with pytest.raises(InputError, match="cannot be read: File name too long; give a folder"):
            inspect(path, verify=False)

    def forbidden(path: Path) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(InputError, match="cannot be read: Permission denied; give a folder"):
        inspect(tmp_path, verify=False)


def test_names_are_shown_as_they_are(make: Callable[..., Path], model: Path, tmp_path: Path, capsys) -> None:
    name = "[red]a[/] :smile: \x1b[2J\x07\u202e"
    path = forged(make(shares=(1,)) / slice_name(0, 1), tmp_path, lambda values: values.update(model=name))
    inspect(path, verify=False)
    shown = capsys.readouterr().out
    assert r"[red]a[/] :smile: \x1b[2J\x07\u202e" in " ".join(shown.split())
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    folder = tmp_path / "[bold]m[/bold]\x1b[2J"
    shutil.copytree(model, folder)
    inspect(folder, verify=False)
    shown = capsys.readouterr().out
    assert r"[bold]m[/bold]\x1b[2J" in "".join(shown.split())
    assert "\x1b" not in shown


def test_a_slice_that_is_forged_is_broken(make: Callable[..., Path], tmp_path: Path, capsys) -> None:
    path = forged(make() / slice_name(1, 2), tmp_path, lambda values: values["tiles"].pop())
    with pytest.raises(SliceError, match="its tiles do not fit its plan"):
        inspect(path, verify=False)
    assert "broken" in capsys.readouterr().out


def test_a_file_is_closed_after_it_was_shown(make: Callable[..., Path], monkeypatch) -> None:
    closed: list[Path] = []
    close = SliceFile.close

    def noted(file: SliceFile) -> None:
        closed.append(file.path)
        close(file)

    monkeypatch.setattr(SliceFile, "close", noted)
    folder = make()
    inspect(folder, verify=False)
    assert sorted(closed) == sorted(folder.iterdir())


def test_what_was_found_as_json(make: Callable[..., Path], model: Path, tmp_path: Path, capsys) -> None:
    folder, file = make(), tmp_path / "found.json"
    inspect(folder, verify=False, json=file)
    table = capsys.readouterr().out.rstrip().splitlines()
    assert len(table) == 3, "a line for each slice, and none is wrapped where there is no terminal"
    found = json.loads(file.read_text())
    assert [slice["file"] for slice in found["slices"]] == [slice_name(0, 2), slice_name(1, 2)]
    assert found["slices"][1]["bytes"] == (folder / slice_name(1, 2)).stat().st_size
    assert (found["model"], found["problem"]) == (None, None)
    (folder / slice_name(1, 2)).write_bytes(b"nothing")
    with pytest.raises(SliceError) as caught:
        inspect(folder, verify=False, json=file)
    found = json.loads(file.read_text())
    assert found["problem"] == str(caught.value) and found["slices"][1]["state"] == "broken"
    inspect(model, verify=True, json=file)
    told = json.loads(file.read_text())["model"]
    assert (
        told["config"]["architecture"] == "llama" and told["whole"] and sum(told["formats"].values()) == told["tensors"]
    )


def told_of(path: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """What `inspect` writes as JSON of a model, whether it runs or not."""
    file = tmp_path / "told.json"
    with contextlib.suppress(ModelError):
        inspect(path, verify=False, json=file, **options)
    found = json.loads(file.read_text())
    model = found["model"]
    assert found["problem"] in (None, model["why_not"]) and model["runs"] == (model["why_not"] is None)
    return dict(model)


def test_a_model_that_runs_is_told_by_what_it_is(smollm2: Path, tmp_path: Path, capsys) -> None:
    told = told_of(smollm2, tmp_path)
    reader = gguf.GGUFReader(smollm2)
    stored: dict[str, dict[str, int]] = {}
    for tensor in reader.tensors:
        of = stored.setdefault(tensor.tensor_type.name.lower(), {"nbytes": 0, "tensors": 0})
        of["nbytes"] += int(tensor.n_bytes)
        of["tensors"] += 1
    assert told["stored"] == stored
    assert (told["kind"], told["family"], told["context"]) == ("GGUF version 3", "llama", 8192)
    assert told["chat_templates"] == ["default"] and told["runs"]
    out = " ".join(capsys.readouterr().out.split())
    assert "kind GGUF version 3" in out and "chat template yes" in out and "runs yes" in out and "formats q4_1 " in out


def test_a_model_that_does_not_run_is_told_too(model: Path, tmp_path: Path, capsys) -> None:
    tensors = gguf_tensors("llama")
    path = write_tiny_gguf(
        tmp_path / "m.gguf", "mamba", tensors, edit=lambda w: w.add_chat_template("x"), split_max_tensors=9
    )
    path = path.with_name("m-00002-of-00003.gguf")
    told = told_of(path, tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "kind GGUF version 3 in 3 parts family mamba" in out and "context 128 positions" in out and "runs no" in out
    assert "'mamba', which tpimpi does not compute" in told["why_not"] and told["chat_templates"] == ["default"]
    assert set(told["stored"]) == {"q8_0", "f32"} and sum(of["tensors"] for of in told["stored"].values()) == len(
        tensors
    )
    fp8 = Path(shutil.copytree(model, tmp_path / "fp8"))
    (fp8 / "chat_template.jinja").write_text("x")
    values = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "fp8"}}))
    told = told_of(fp8, tmp_path)
    assert told["kind"] == "Hugging Face directory, 1 safetensors file" and told["family"] == "llama (LlamaForCausalLM)"
    assert "FP8" in told["why_not"] and told["context"] == 128 and told["chat_templates"] == ["default"]
    weights = json.loads((model / "config.json").read_text())
    assert told["stored"]["f32"]["nbytes"] > weights["vocab_size"] * weights["hidden_size"] * 4


def test_a_tokenizer_that_no_run_can_use_is_a_reason(model: Path, tmp_path: Path) -> None:
    def refuse(assets: dict[str, bytes], vocab: int) -> None:
        assert assets["tokenizer.json"] == b"{}" and vocab == 160
        raise ModelError("no such tokenizer")

    assert told_of(model, tmp_path)["runs"]
    assert told_of(model, tmp_path, check_tokenizer=refuse)["why_not"] == "no such tokenizer"


def test_a_folder_without_its_config_is_told(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"holds safetensors and no config\.json; download"):
        inspect(tmp_path, verify=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no model and no slices"):
        inspect(tmp_path, verify=False)


def test_a_folder_of_a_hugging_face_cache_is_told(model: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "models--a--b" / "snapshots"
    shutil.copytree(model, snapshots / "c")
    assert told_of(snapshots, tmp_path)["name"] == "b"
    with pytest.raises(ModelError, match="is a Hugging Face cache, of 1 model") as caught:
        inspect(tmp_path, verify=False, json=tmp_path / "told.json")
    found = json.loads((tmp_path / "told.json").read_text())
    assert (found["model"], found["problem"]) == (None, str(caught.value))
