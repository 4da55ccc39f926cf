"""The build: what a wheel holds with a C++ compiler and without; and that a level's instructions stay in its functions."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.builds import extension_builds
from tests.support.launch import ROOT, Result, run_command

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
TOO_OLD = """#!/bin/sh
for argument; do
  case "$argument" in *++20 | *++2a) echo "unknown standard $argument" >&2; exit 1 ;; esac
done
exec {compiler} "$@"
"""


def build_wheel(folder: Path, *options: str, **env: str) -> Result:
    """Build the wheel into `folder`, with the build requirements that the tests' environment has."""
    command = [sys.executable, "-m", "pip", "-v", "wheel", "--no-deps", "--no-build-isolation"]
    return run_command([*command, "--wheel-dir", str(folder), *options, str(ROOT)], env=env, timeout=800)


def unpacked(folder: Path) -> tuple[list[str], Path]:
    """The names in the one wheel in `folder`, and where they now lie."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return archive.namelist(), folder / "site"


def extensions(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".so", ".pyd", ".dylib"))]


def imported(site: Path, program: str) -> Result:
    """Run a program with tpimpi from `site`, and all else from the tests' environment."""
    # Without -S the import hook of an editable install would come first.
    paths = os.pathsep.join((str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    return run_command([sys.executable, "-S", "-c", program], env={"PYTHONPATH": paths}, cwd=site)


@pytest.mark.parametrize("compiler", ["none", "not there", "too old"])
@pytest.mark.slow
def test_a_wheel_without_a_working_compiler_has_no_extension_and_runs(tmp_path: Path, compiler: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    env = {"PATH": str(tools), "CXX": "", "CC": ""}
    if compiler == "not there":
        env = {"CXX": str(tools / "c++")}
    elif compiler == "too old":
        if COMPILER is None:
            pytest.skip("no C++ compiler is here")
        (tools / "c++").write_text(TOO_OLD.format(compiler=shutil.which(COMPILER)))
        (tools / "c++").chmod(0o755)
        env = {"CXX": str(tools / "c++")}

    built = build_wheel(tmp_path, f"--config-settings=build-dir={tmp_path / 'cmake'}", **env)
    assert built.code == 0, built.err + built.out
    said = " ".join((built.out + built.err).split())
    assert "tpimpi is installed without its native kernels" in said
    assert (
        "cannot build the portable kernels" if compiler == "too old" else "no working C++ compiler was found"
    ) in said

    names, site = unpacked(tmp_path)
    assert extensions(names) == []
    page = ROOT / "src/tpimpi/serving/server/page"
    files = {str(path.relative_to(ROOT / "src")) for path in page.rglob("*") if path.is_file()}
    assert {"tpimpi/py.typed", *files} <= set(names)
    program = (
        "import tpimpi.cli.main, tpimpi.compute.backends as b; print(tpimpi.__file__, b.load_backend('auto', 1).name)"
    )
    ran = imported(site, program)
    assert (ran.code, ran.out.split()) == (0, [str(site / "tpimpi" / "__init__.py"), "torch"]), ran.err


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here")
@pytest.mark.alone  # test_kernels.py builds in the same folder
@pytest.mark.slow
def test_a_wheel_has_the_extension_and_each_level_keeps_its_instructions_to_itself(tmp_path: Path) -> None:
    built = build_wheel(tmp_path)  # in the folder that is kept: what the set-up compiled is not compiled again
    assert built.code == 0, built.err + built.out
    names, site = unpacked(tmp_path)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert extensions(names) == [f"tpimpi/_native{suffix}"]
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    ran = imported(
        site,
        "import tpimpi.compute.backends as b, tpimpi._native as n; print(n.__file__, b.load_backend('auto', 1).name)",
    )
    assert (ran.code, ran.out.split()) == (0, [str(site / "tpimpi" / f"_native{suffix}"), "native"]), ran.err

    # Of a function that several objects define the linker keeps one, perhaps with instructions that not every processor has.
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm is here to look for functions that levels share")
    (folder,) = extension_builds()
    objects = sorted(folder.rglob("level_*.o"))
    assert len(objects) >= 2
    for path in objects:
        listed = run_command([nm, "--defined-only", "--extern-only", str(path)], env={})
        assert listed.code == 0, listed.err
        defined = [line.split()[1:] for line in listed.out.splitlines()]
        assert [kind for kind, _ in defined] in (["D"], ["R"]), f"{path.name} defines more than its table: {defined}"
