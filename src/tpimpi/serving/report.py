"""What a run measured: a table for people, JSON for programs."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tpimpi.compute.arrays import median
from tpimpi.engine.figures import AuditFigures, RankFigures, disk_lines
from tpimpi.serving.generate import GenerationFigures
from tpimpi.star.tuning import describe_rule
from tpimpi.system.files import write_json
from tpimpi.system.units import show_size

# By transcript.END_REASONS.
FINISH_REASONS = {"end": "stop", "stop": "stop", "max_tokens": "length", "context": "length", "cancelled": "abort"}
_DISK_LIMITED_SHARE = 0.3  # of a rank's time: above it, waiting for the disk is said to limit the run


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt. Times are in seconds.

    `ttft_s` is from the prompt being ready to the first token (None where there was none). `s_per_token` is the median of
    the times between two tokens, `s_per_token_mean` their mean (both None with fewer than two): where a few tokens take
    long (a processor quota, a disk), only the mean says how long the answer took.
    `reasoning` is what the model wrote before its answer and marked as such; "" where there is none.
    `finish_reason` is OpenAI's word for why it ended: "stop" by itself or before a stop text, "length" cut, where no more
    tokens were allowed or the context was full; or vLLM's: "abort" stopped by its user.
    `cached_tokens` is OpenAI's word for how many tokens of the prompt were not computed again, `rows_computed` how many
    positions went through the layers for prompt and answer. `passes` gave tokens, `tokens_per_pass` each (None where
    none did): more than 1 with speculation, which drafted `drafted_tokens`, of which `accepted_tokens` were right. Tokens of
    one pass share its time.
    """

    text: str
    reasoning: str
    token_ids: list[int]
    prompt_tokens: int
    ttft_s: float | None
    s_per_token: float | None
    s_per_token_mean: float | None
    finish_reason: str
    cached_tokens: int = 0
    rows_computed: int = 0
    passes: int = 0
    tokens_per_pass: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def timed(
        cls,
        text: str,
        token_ids: list[int],
        prompt_tokens: int,
        ready: float,
        times: list[tuple[int, float]],
        cached_tokens: int,
        figures: GenerationFigures,
        *,
        ended: str,
        reasoning: str = "",
    ) -> Answer:
        """From the monotonic times of the prompt being ready and of each token, with the number of its pass; `ended` is one
        of transcript.END_REASONS."""
        gaps = _gaps(times)
        first = times[0][1] - ready if times else None
        middle, average = (median(gaps), sum(gaps) / len(gaps)) if gaps else (None, None)
        reason = FINISH_REASONS[ended]
        return cls(
            *(text, reasoning, token_ids, prompt_tokens, first, middle, average, reason, cached_tokens),
            rows_computed=figures.rows,
            passes=figures.passes,
            tokens_per_pass=figures.sampled / figures.passes if figures.passes else None,
            drafted_tokens=figures.drafted,
            accepted_tokens=figures.accepted,
        )


def _gaps(times: Sequence[tuple[int, float]]) -> list[float]:
    """Seconds between tokens, of which those of one pass each have the same part of the time since the pass before."""
    last = dict(times)  # when the last token of each pass was there
    count = Counter(number for number, _ in times)
    gaps: list[float] = []
    for (_, then), (number, at) in itertools.pairwise(last.items()):
        gaps += [(at - then) / count[number]] * count[number]
    return gaps


@dataclass
class BatchFigures:
    """What was done for many prompts at once. `rows` went through the layers in `steps` passes, of `together` sequences at
    most, `sequences` in all passes; `tokens` were chosen, in `seconds`; of `drafted_tokens` so many were `accepted_tokens`.
    `preempted` is how often a sequence gave its memory to others, and was computed again."""

    together: int
    steps: int = 0
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    preempted: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add_step(
        self, rows: int, sequences: int, tokens: int, seconds: float, *, drafted: int = 0, accepted: int = 0
    ) -> None:
        """One more pass."""
        self.steps += 1
        self.rows += rows
        self.sequences += sequences
        self.tokens += tokens
        self.seconds += seconds
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted


@dataclass
class Report:
    """A run, as `--report` writes it.

    `load_s` is from the start of the program to being ready. Where several prompts were answered, `text` to
    `accepted_tokens` are those of the last; `answers` has these keys for each. `batch` is there with --batch-file.
    """

    model: str
    format: str
    backend: str
    allreduce: str
    sealed: str | None = None  # the cipher of the links between ranks
    prompt_chunk: int = 0  # positions of a prompt that were computed at once
    load_s: float = 0.0
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    ttft_s: float | None = None
    s_per_token: float | None = None
    s_per_token_mean: float | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    rows_computed: int = 0
    passes: int = 0
    tokens_per_pass: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    answers: list[Answer] = field(default_factory=list)
    answered: int = 0  # prompts
    batch: BatchFigures | None = None
    ranks: list[RankFigures] = field(default_factory=list)
    audit: AuditFigures | None = None  # where sums were audited

    def add(self, answer: Answer, *, keep: bool = True) -> None:
        """Note the answer to one more prompt; unless `keep`, `answers` has the last one alone."""
        if not keep:
            self.answers.clear()
        self.answers.append(answer)
        self.answered += 1
        for key, value in asdict(answer).items():
            setattr(self, key, value)

    def write(self, path: Path) -> None:
        """Write JSON to `path`, for its owner alone; see write_json. Raises StorageError."""
        write_json(path, asdict(self), private=True)

    def print_table(self) -> None:
        """The table, on stderr. Its columns are of the whole run, the line below it of the last answer."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="none")
        table.add_column("rank host")
        for name in ("heads", "columns", "peak memory", "without weights", "read", "compute", "disk wait", "star"):
            table.add_column(name, justify="right")
        for r in self.ranks:
            table.add_row(
                f"r{r.rank} {r.host}",
                str(r.heads),
                str(r.columns),
                show_size(r.peak_rss_bytes),
                show_size(r.peak_rss_bytes - r.weights_bytes),
                show_size(r.bytes_read),
                *(f"{seconds:.2f} s" for seconds in (r.compute_s, r.read_wait_s, r.star_s)),
            )
        times = [f"load {self.load_s:.2f} s"]
        if self.ttft_s is not None:
            times.append(f"first token {self.ttft_s:.2f} s")
        if self.s_per_token is not None and self.s_per_token_mean is not None:
            times.append(f"{self.s_per_token_mean:.3g} s/token (mean; median {self.s_per_token:.3g})")
        if self.drafted_tokens:
            times.append(shown_speculation(self))
        mixture = _experts_lines(self.ranks)
        print(file=sys.stderr)
        Console(file=sys.stderr, width=120, highlight=False, color_system=None).print(table)
        held = f" ({self.cached_tokens} computed before)" if self.cached_tokens else ""
        last = f"last of {self.answered} prompts: " if self.answered > 1 else ""
        sealed = ", sealed" if self.sealed else ""
        print(
            f"{self.model} {self.format} · {self.backend} · {describe_rule(self.allreduce)}{sealed} · "
            f"{last}{self.prompt_tokens} prompt tokens{held}, {len(self.token_ids)} generated · " + " · ".join(times),
            file=sys.stderr,
        )
        for line in mixture:
            print(line, file=sys.stderr)
        if self.audit is not None:
            print(_audit_line(self.audit), file=sys.stderr)
        if self.s_per_token_mean is not None:
            used = [(r.host, r.device, r.streamed_bytes_per_token) for r in self.ranks]
            rates = [(*what, what[2] / self.s_per_token_mean) for what in used]
            busy = [(r.read_wait_s, r.read_wait_s + r.compute_s + r.star_s) for r in self.ranks]
            limited = any(waited > _DISK_LIMITED_SHARE * whole for waited, whole in busy)
            for line in disk_lines(rates, alone=limited):
                print(f"seen: {line}", file=sys.stderr)
        sys.stderr.flush()


def shown_speculation(answer: Answer | Report) -> str:
    """What speculation did for an answer."""
    return (
        f"{answer.passes} passes, {answer.tokens_per_pass:.2f} tokens each "
        f"({answer.accepted_tokens} of {answer.drafted_tokens} drafted tokens accepted)"
    )


def _audit_line(audit: AuditFigures) -> str:
    """What was audited."""
    rate = "auto" if audit.rate is None else f"{audit.rate:g}"
    return (
        f"audits ({rate}): {audit.audits} sums of {audit.steps} steps, {audit.tiles} tiles computed from {audit.against}; "
        f"{audit.seconds:.2f} s beside {audit.step_seconds:.2f} s"
    )


def _experts_lines(ranks: Sequence[RankFigures]) -> Iterator[str]:
    """What each rank's expert cache did, in a line; nothing of a dense model."""
    for rank in ranks:
        if (did := rank.experts) is None or not did.used:
            continue
        line = f"experts of r{rank.rank}: {did.used} used, {did.hits / did.used:.0%} of them in memory"
        if did.expected:
            line += (
                f"; {did.expected} read before they were chosen, {did.expected_used / did.expected:.0%} of them used"
            )
            line += f" ({show_size(did.expected_bytes)} of {show_size(did.bytes_read)} read)"
        yield line
