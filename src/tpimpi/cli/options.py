"""The options of a run, and of perplexity: parsed once (run_options.py), frozen, and the same throughout.

The defaults here are those of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpimpi.star import DEFAULT_SILENCE_S, DEFAULT_TIMEOUT_S

SHOW, HIDE = REASONING_CHOICES = ("show", "hide")
DEFAULT_PARALLEL = 8  # prompts of a batch that are answered at once
ERROR, DROP = OVERFLOW_CHOICES = ("error", "drop")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which slices. `format` is "auto" or one of FORMAT_CHOICES; `shares` as the user writes them."""

    model: str | None = None
    slices: str | None = None
    format: str = "auto"
    shares: str | None = None


@dataclass(frozen=True)
class MemoryLimit:
    """A --memory that was given, and its meaning: bytes of every rank, or of each; None for auto."""

    given: str
    sizes: tuple[int, ...] | None


@dataclass(frozen=True)
class ComputeOptions:
    """How each rank computes. `memory` and `window` (a number of blocks, or "all") are None where they are not given."""

    backend: str = "auto"
    kernels: str = "auto"
    memory: MemoryLimit | None = None
    window: int | str | None = None
    kv: str = "auto"
    threads: int | None = None
    prompt_chunk: int | None = None
    predict: int | None = None

    @property
    def memory_sizes(self) -> tuple[int, ...] | None:
        """Bytes of every rank, or of each; None for auto."""
        return None if self.memory is None else self.memory.sizes


@dataclass(frozen=True)
class NetworkOptions:
    """How the ranks talk. `allreduce` is one of ALLREDUCES, or the rule that was chosen for auto; times in seconds."""

    allreduce: str = "auto"
    wire: str = "f32"
    timeout: float = DEFAULT_TIMEOUT_S
    silence: float = DEFAULT_SILENCE_S


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer's tokens are chosen, and prompts encoded: what holds for a whole conversation (session.SAMPLING)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    raw: bool = False


@dataclass(frozen=True)
class GenerateOptions:
    """The prompt, or the prompts of `batch_file`, of which `parallel` are answered at once into `out`; and how they are
    answered. `speculate` is how many tokens are drafted, 0 for none, None for as many as pay, `draft` a model that drafts;
    `overflow` is one of OVERFLOW_CHOICES, `given` are the sampling options that the command line has."""

    prompt: str | None = None
    prompt_file: str | None = None
    batch_file: str | None = None
    out: str | None = None
    parallel: int | None = None  # DEFAULT_PARALLEL where it is not given
    session: str | None = None
    session_key_file: str | None = None
    keep_cache: str | None = None
    system: str | None = None
    system_file: str | None = None
    overflow: str = ERROR
    max_tokens: int = 256
    context: int | None = None
    stop: tuple[str, ...] = ()
    stop_file: str | None = None
    ignore_eos: bool = False
    speculate: int | None = None
    draft: str | None = None
    chat_template: str | None = None
    sampling: SamplingOptions = SamplingOptions()
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputOptions:
    """What is written where, beside the answer. `reasoning` is one of REASONING_CHOICES, or None where it is not given."""

    quiet: bool = False
    reasoning: str | None = None
    report: str | None = None
    trace: str | None = None
    record_routing: str | None = None
    plot: str | None = None

    @property
    def shows_reasoning(self) -> bool:
        """Whether reasoning is shown beside the answer."""
        return not self.quiet if self.reasoning is None else self.reasoning == SHOW


@dataclass(frozen=True)
class RunOptions:
    """All options of a run. `audit` is the part of the steps that are audited, None for auto, 0 for off."""

    model: ModelOptions
    compute: ComputeOptions
    network: NetworkOptions
    generate: GenerateOptions
    output: OutputOptions
    audit: float | None = None


@dataclass(frozen=True)
class ServeOptions:
    """All options of `serve`. `grace` and `time_limit` in seconds; `front` is the socket of a front that is there already;
    see FrontOptions for the others."""

    run: RunOptions
    host: str
    port: int
    api_key_file: str | None
    tls_cert: str | None
    tls_key: str | None
    grace: float
    queue: int
    time_limit: float
    allow_host: tuple[str, ...]
    allow_origin: tuple[str, ...]
    name: tuple[str, ...]
    journal: str | None
    journal_key_file: str | None
    front: str | None


@dataclass(frozen=True)
class UpOptions:
    """Options of `up` itself. `ssh` reaches the hosts, called as PROGRAM HOST COMMAND; `ranks` are on this machine, where
    there is no hostfile."""

    hostfile: str | None
    ranks: int
    ssh: str
    run_under: str | None
    wake: bool


@dataclass(frozen=True)
class PerplexityOptions:
    """All options of `perplexity`. `against` is one of WEIGHT_FORMATS; `context` in positions."""

    text: str
    against: str | None
    context: int | None
    max_tokens: int | None
    second_half: bool
    model: ModelOptions
    compute: ComputeOptions
    network: NetworkOptions
    output: OutputOptions
