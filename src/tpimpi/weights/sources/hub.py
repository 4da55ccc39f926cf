"""Find a model in a Hugging Face cache, by its name there or by one of the cache's folders. No network is used.

The cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache) holds a folder a model, models--ORG--NAME, with
snapshots/COMMIT, whose files are symbolic links into blobs/, and refs/BRANCH, each a file that holds a branch's commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tpimpi.errors import ModelError
from tpimpi.weights.sources.weight_file import unreadable, what_is

_FOLDER = re.compile(r"models--(?P<name>.+)", re.DOTALL)
_NAME_PART = r"[A-Za-z0-9_](?:[\w.\-]*[\w])?"
_MODEL = re.compile(rf"(?P<model>{_NAME_PART}/{_NAME_PART})(?:/(?P<file>.+))?", re.ASCII)
_MAIN = "main"  # the branch that downloads take where nobody says another
_MAX_SHOWN = 5  # names in one message


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder where Hugging Face's programs keep what they download: HF_HUB_CACHE, HF_HOME/hub, or that of the user."""
    if chosen := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expanduser(chosen))  # noqa: PTH111 (of an unknown user it stays as it is)
    home = environment.get("HF_HOME")
    if not home:
        home = os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118
    return Path(os.path.expanduser(home)) / "hub"  # noqa: PTH111


def in_hub_cache(given: Path) -> Path | None:
    """Where the cache has `given`, ORG/NAME or ORG/NAME/FILE; None where that is no such name, or is not there.

    Raises ModelError where the model is there and nothing of it can be used.
    """
    match = _MODEL.fullmatch(str(given))
    if match is None:
        return None
    folder = hub_cache() / f"models--{match['model'].replace('/', '--')}"
    if what_is(folder) != "a directory":
        return None
    snapshot = _snapshot(folder)
    if not match["file"]:
        return snapshot
    if what_is(file := snapshot / match["file"]) == "nothing":
        raise ModelError(
            f"model not found: {given}: what the Hugging Face cache has of {match['model']} holds no such file; look into "
            f"{snapshot}, or download it (hf download {match['model']} {match['file']})"
        )
    return file


def not_found(given: Path) -> ModelError:
    """That there is no model at `given`, and for a name as Hugging Face has them where else it was looked for."""
    match = _MODEL.fullmatch(str(given))
    if match is None or match["file"] or given.suffix.lower() == ".gguf":
        return ModelError(f"model not found: {given}; give a Hugging Face directory or a .gguf file")
    return ModelError(
        f"model not found: {given} is neither a folder nor in the Hugging Face cache, {hub_cache()}; download it "
        f"(hf download {given}), or give a Hugging Face directory or a .gguf file"
    )


def resolve_folder(folder: Path) -> Path:
    """The folder with the files of a model where `folder` is one of a cache, else `folder` as it is.

    Raises ModelError for a folder with several models, or of which nothing can be used.
    """
    if _FOLDER.fullmatch(_name(folder)) and what_is(folder / "snapshots") == "a directory":
        return _snapshot(folder)
    if folder.name == "snapshots" and _FOLDER.fullmatch(_name(folder.parent)):
        return _snapshot(folder.parent)
    for root in (folder, folder / "hub"):
        if models := _models(root):
            names = ", ".join(models[:_MAX_SHOWN]) + (", …" if len(models) > _MAX_SHOWN else "")
            raise ModelError(
                f"{folder}: is a Hugging Face cache, of {len(models)} model{'s' if len(models) > 1 else ''} ({names}); "
                f"give --model {root / _folder_of(models[0])}"
                + (f", or {models[0]}" if _same(root, hub_cache()) else "")
            )
    return folder


def model_of_snapshot(path: Path) -> str | None:
    """The name of the model, without its organisation's, where `path` is a snapshot of a cache."""
    parents = Path(os.path.abspath(path)).parents  # noqa: PTH100 (links stay)
    if len(parents) < 2 or parents[0].name != "snapshots":
        return None
    match = _FOLDER.fullmatch(parents[1].name)
    return match["name"].rpartition("--")[2] if match else None


def _name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))  # noqa: PTH100, PTH119 (links stay)


def _same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _folder_of(model: str) -> str:
    return f"models--{model.replace('/', '--')}"


def _models(root: Path) -> list[str]:
    """The models of a cache, by name: ORG/NAME."""
    if what_is(root) != "a directory":
        return []
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError as error:
        raise unreadable(root, error) from error
    found = [match["name"] for name in names if (match := _FOLDER.fullmatch(name))]
    return ["/".join(name.split("--", 1)) for name in found]


def _snapshot(folder: Path) -> Path:
    """The snapshot that the branch main is at, or else the only one."""
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / _MAIN).read_text().strip()
        found = snapshots / commit
        if commit and Path(commit).name == commit and what_is(found) == "a directory":
            return found
    except (OSError, ValueError):  # no such branch, or a file that is no text
        pass
    try:
        there = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    except OSError as error:
        raise unreadable(snapshots, error) from error
    if len(there) == 1:
        return there[0]
    if not there:
        raise ModelError(f"{folder}: holds no snapshot of the model; download it again (hf download)")
    names = ", ".join(path.name for path in there[:_MAX_SHOWN])
    raise ModelError(
        f"{folder}: holds {len(there)} snapshots ({names}), and refs/{_MAIN} names none of them; give --model {there[0]}"
    )
