"""What jobs/setup.sh installs by hash, against pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.launch import ROOT

FOLDER = ROOT / "requirements"
FILES = sorted(path.name for path in FOLDER.glob("*.txt"))


def pinned(text: str) -> dict[str, Requirement]:
    """The packages of a file, by name, each with one version."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M)).splitlines()
    found = [Requirement(line.partition(" --hash")[0]) for line in lines if line.strip()]
    assert all(re.fullmatch(r"==[\w.+!]+", str(one.specifier)) for one in found)
    return {canonicalize_name(one.name): one for one in found}


def wanted(*names: str) -> list[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    lists = {"build": project["build-system"]["requires"], "run": project["project"]["dependencies"]}
    lists |= project["project"]["optional-dependencies"]
    tools = re.findall(r"^[^#\n]+$", (FOLDER / "tools.in").read_text(), re.M)
    return [Requirement(line) for line in (*tools, *(one for name in names for one in lists[name]))]


def test_all_that_a_run_needs_is_there() -> None:
    found = pinned((FOLDER / "run.txt").read_text())
    for requirement in wanted("build", "run", "serve"):
        name = canonicalize_name(requirement.name)
        assert name in found, f"{requirement} is not in requirements/run.txt; run: bash jobs/requirements.sh"
        (pin,) = found[name].specifier
        assert requirement.specifier.contains(pin.version), f"{found[name]} is not {requirement}"


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_constraints_and_every_one_has_hashes(name: str) -> None:
    text, constraints = (FOLDER / name).read_text(), pinned((ROOT / "constraints.txt").read_text())
    found = pinned(text)
    assert found
    for package, requirement in found.items():
        assert package in constraints, f"{package} is not in constraints.txt"
        assert requirement.specifier == constraints[package].specifier
    hashes = [
        re.findall(r"--hash=sha256:[0-9a-f]{64}", part) for part in re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]
    ]
    assert len(hashes) == len(found) and all(hashes)
    assert "://" not in re.sub(r"^\s*#.*$", "", text, flags=re.M), "an index belongs to the machine, not into the tree"


def test_the_scripts_install_these_files() -> None:
    setup = (ROOT / "jobs" / "setup.sh").read_text()
    used = re.findall(r"--require-hashes (?:--prefix \S+ )?--requirement requirements/(\S+)", setup)
    assert sorted(used) == FILES
