"""Other programs that run large language models, measured as ours are: on a device of an emulated home, under its limits.

    with Home([Device("laptop", cores=0.5, memory=1 << 30, read_bps=200_000_000)]) as home:
        ready = prepare("airllm", model, work, environments=environments)
        figures = run_peer(home, "airllm", ready, prompt=[1, 15043, 29871], tokens=8, threads=1, context=512,
                           environments=environments, timeout=600)

They run in virtual environments of their own, made on first use with the versions that are fixed here. pip finds these as it
does for jobs/setup.sh; docs/guide.md, "Installing by hand", says how torch comes without CUDA. What runs is in
bench/peers/programs, and imports nothing of ours. Weights come as each program takes them: a Hugging Face folder in bf16, or
a GGUF file. Decoding is greedy, on token ids; no tokenizer is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock

from bench.home import Home
from tpimpi.errors import TpimpiError

PROGRAMS = Path(__file__).resolve().parent / "programs"
ENVIRONMENTS_FOLDER = Path("/var/tmp/tpimpi-peers")
OUT_OF_MEMORY = "out of memory"
FIGURES = ("load_s", "ttft_s", "ttft_warm_s", "s_per_token", "token_ids", "peak_rss_bytes", "versions")
# What programs say when the system gives them no more memory.
_NO_MEMORY = re.compile(r"\bMemoryError\b|can't allocate memory|Cannot allocate memory|std::bad_alloc")


class PeerError(TpimpiError):
    """A peer could not be installed, or did not run."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what pip installs, and the variables that it builds with."""

    requirements: tuple[str, ...]
    build: Mapping[str, str] = field(default_factory=dict)
    takes: str = "some minutes"


@dataclass(frozen=True)
class Peer:
    """A program: its environment by name, its script, and the model it takes (a Hugging Face folder or a GGUF file).

    `arguments` of the script may contain {memory}: the device's limit in bytes, 0 where it has none.
    `prepares`: the script has to be run once with --prepare.
    """

    environment: str
    program: str
    takes: Literal["hf", "gguf"]
    arguments: tuple[str, ...] = ()
    prepares: bool = False


ENVIRONMENTS = {
    "torch": Environment(
        (
            "torch==2.13.0",
            "transformers==5.23.0",
            "accelerate==1.15.0",
            "airllm==4.0.0",
            "safetensors==0.8.0",
            "tokenizers==0.23.3",
            "huggingface_hub==2.4.0",
            "numpy==2.4.6",
        )
    ),
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF"},
        "about ten minutes on two cores",
    ),
}
# from_pretrained leaves weights that need no conversion mapped from the file, so that the system can drop them and read them
# again: "transformers" is that, as users get it; "transformers-copied" has them in memory of its own. "accelerate" and
# "accelerate-copied" are the same of the weights that accelerate does not read for each token.
PEERS = {
    "transformers": Peer("torch", "run_transformers.py", "hf"),
    "transformers-copied": Peer("torch", "run_transformers.py", "hf", ("--copy",)),
    "accelerate": Peer("torch", "run_transformers.py", "hf", ("--offload", "{memory}")),
    "accelerate-copied": Peer("torch", "run_transformers.py", "hf", ("--copy", "--offload", "{memory}")),
    "airllm": Peer("torch", "run_airllm.py", "hf", prepares=True),
    "llama.cpp": Peer("llama.cpp", "run_llama_cpp.py", "gguf"),
    "llama.cpp-mmap": Peer("llama.cpp", "run_llama_cpp.py", "gguf", ("--mmap",)),
}


def _peer(name: str) -> Peer:
    if name not in PEERS:
        raise PeerError(f"unknown peer {name!r}; known are {', '.join(PEERS)}")
    return PEERS[name]


# Installing


def make_environment(name: str, folder: Path) -> Path:
    """The python of the peer's environment under `folder`, made where it is not as the table says. Raises PeerError."""
    peer = _peer(name)
    wanted = ENVIRONMENTS[peer.environment]
    place = folder.resolve() / peer.environment
    python, stamp, log = place / "bin" / "python", place / "installed.json", place.with_name(f"{place.name}.log")
    made_of = json.dumps({**asdict(wanted), "python": sys.version}, indent=1)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{place.name}.lock")):
        if stamp.exists() and stamp.read_text() == made_of:
            return python
        print(
            f"peers: making the environment of {name} in {place} ({wanted.takes}; log: {log})",
            file=sys.stderr,
            flush=True,
        )
        shutil.rmtree(place, ignore_errors=True)
        parallel = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
        pip = ["-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
        with log.open("w") as output:
            for arguments in (["-m", "venv", "--without-pip", str(place)], [*pip, *wanted.requirements]):
                done = subprocess.run(
                    [sys.executable, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **parallel, **wanted.build},
                    check=False,
                )
                if done.returncode:
                    said = _last_lines(log.read_text(errors="replace"), 1)
                    raise PeerError(f"the environment of {name} cannot be made ({said}); see {log}")
        stamp.write_text(made_of)
    return python


# Preparing


def prepare(name: str, model: Path, folder: Path, *, environments: Path = ENVIRONMENTS_FOLDER) -> Path:
    """What run_peer takes as the model: `model`, or what the peer makes of it once, without limits, in `folder`.

    Made anew where the model's files have changed. Raises PeerError.
    """
    peer = _peer(name)
    if not peer.prepares:
        return model
    model, ready = model.resolve(), folder.resolve() / f"{name}-{model.resolve().name}"
    stamp = ready / "prepared-of.json"
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(model)]
    made_of = json.dumps([ENVIRONMENTS[peer.environment].requirements, facts], indent=1)
    ready.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(ready.with_name(f"{ready.name}.lock")):
        if stamp.exists() and stamp.read_text() == made_of:
            return ready
        python = make_environment(name, environments)
        print(f"peers: preparing {model} for {name} in {ready}", file=sys.stderr, flush=True)
        shutil.rmtree(ready, ignore_errors=True)
        done = subprocess.run(
            [*_python(python), str(PROGRAMS / peer.program), "--model", str(model), "--prepare", str(ready)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **_variables(os.cpu_count() or 1)},
            check=False,
        )
        if done.returncode:
            raise PeerError(f"{name} cannot prepare {model}: {_last_lines(done.stderr)}")
        stamp.write_text(made_of)
    return ready


# Running


def run_peer(
    home: Home,
    name: str,
    model: Path,
    *,
    prompt: Sequence[int],
    tokens: int,
    threads: int,
    context: int,
    environments: Path,
    timeout: float,
    rank: int = 0,
) -> dict[str, Any]:
    """FIGURES of one run on device `rank`, with the model's files out of the page cache at its start; or why it was killed.

    `model` is what `prepare` gave; `prompt` token ids; `context` positions; `timeout` seconds from the program's start.
    Times are in seconds: ttft_s right after loading, ttft_warm_s for the same prompt again with an empty cache, s_per_token
    the median of the steps after the first token (None with one token). A run that was killed is {"killed": "out of memory"}
    or {"killed": "took over N s"}. Raises PeerError for all else that goes wrong.
    """
    peer = _peer(name)
    python = make_environment(name, environments)
    drop_from_page_cache(model)
    memory = home.devices[rank].memory or 0
    command = [*_python(python), str(PROGRAMS / peer.program), "--model", str(model.resolve())]
    command += ["--prompt-ids", " ".join(map(str, prompt)), "--tokens", str(tokens), "--threads", str(threads)]
    command += ["--context", str(context), *(argument.format(memory=memory) for argument in peer.arguments)]
    # Files, not pipes: what a program leaves running could hold those open.
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = home.start(rank, command, env=_variables(threads), stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"killed": f"took over {timeout:g} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
                process.wait()
        printed, said = _text(out), _text(err)
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or (code and _NO_MEMORY.search(_last_lines(said))):
        return {"killed": OUT_OF_MEMORY}
    if code:
        raise PeerError(f"{name} ended with {code}: {_last_lines(said)}")
    return _figures(name, printed)


def _figures(name: str, printed: str) -> dict[str, Any]:
    last = _last_lines(printed, 1)
    try:
        figures: dict[str, Any] = json.loads(last)
        missing = [key for key in FIGURES if key not in figures]
    except (ValueError, TypeError) as error:
        raise PeerError(f"{name} printed no figures; its last line is {last[:200]!r}") from error
    if missing:
        raise PeerError(f"{name} printed figures without {', '.join(missing)}")
    return figures


def drop_from_page_cache(path: Path) -> None:
    """Have the next read of the file, or of all files in the folder, come from the disk. Raises PeerError."""
    for file in _files(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)  # pages that are not written yet would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _files(path: Path) -> list[Path]:
    """The file, or those anywhere in the folder, behind links too."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not found:
        raise PeerError(f"{path}: there is no such file, and no folder with files")
    return found


def _python(python: Path) -> list[str]:
    """The interpreter, without what the user has set for another one."""
    return [str(python), "-E", "-s"]


def _variables(threads: int) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**offline, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _lines(text: str) -> Iterator[str]:
    # A progress bar overwrites its line with "\r".
    return (line.strip() for line in re.split(r"[\r\n]+", text) if line.strip())


def _last_lines(text: str, count: int = 3) -> str:
    """The last lines that are not empty, as one."""
    return " / ".join(list(_lines(text))[-count:]) or "it said nothing"
