"""How well a model predicts a text, and what its weight format costs against another.

The text is tokenized as it is, without a chat template, and cut into chunks of `context` positions; each is run for
itself, with BOS before it where the model's tokenizer puts one. Scored are all positions of a chunk but its first: each
token gets -ln of the probability that the model gives it after what stands before it in the chunk. The last chunk may be
shorter. With `second_half` chunks and positions are those of llama.cpp's llama-perplexity: whole chunks alone, BOS in the
place of the first token of each, and of each the second half scored, which gives a lower figure.

    perplexity     exp(mean of these), its standard error by the delta method: perplexity * standard error of the mean
    KL divergence  sum over the vocabulary of P * ln(P / Q), in nats, for each scored position: P is the next-token
                   distribution of the reference, Q that of the format measured (Kullback and Leibler 1951)

Standard errors take tokens as independent, which those of one text are not quite. For a comparison both models run in
step, so that no logits are ever stored: memory is both models, and logits [positions of a step, vocab] of each.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32
from tpimpi.engine.engine import Engine, OpenedEngine
from tpimpi.engine.figures import RankFigures
from tpimpi.engine.protocol import begin, forward
from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer

F64 = npt.NDArray[np.float64]

CHUNK_POSITIONS = 512  # of a chunk, where --context does not say; fewer where the model has fewer
_WIDENED_ROWS = 8  # rows of logits that are widened to f64 at a time
_PROGRESS_INTERVAL_S = 5.0  # seconds between two lines of progress


# The arithmetic


def cut(ids: Sequence[int], context: int, bos: int | None) -> list[list[int]]:
    """Chunks of at most `context` ids, each beginning with `bos` unless that is None, but none with nothing to score."""
    first = [] if bos is None else [bos]
    room = context - len(first)
    chunks = [[*first, *ids[start : start + room]] for start in range(0, len(ids), room)]
    return [chunk for chunk in chunks if len(chunk) > 1]


def cut_whole(ids: Sequence[int], context: int, bos: int | None) -> list[list[int]]:
    """Chunks of exactly `context` ids as llama-perplexity makes them: of the text with `bos` before it, which also takes
    the place of each chunk's first id, unless it is None. What is left at the end is not used."""
    whole = [*([] if bos is None else [bos]), *ids]
    starts = range(0, len(whole) - context + 1, context)
    return [[whole[start] if bos is None else bos, *whole[start + 1 : start + context]] for start in starts]


def log_normalizers(logits: F32) -> F64:
    """ln(sum(exp(row))) of each row of `logits` [n, vocab]: [n]."""
    result = np.empty(logits.shape[0], np.float64)
    for rows in _runs(logits.shape[0]):
        wide = logits[rows].astype(np.float64)
        most = wide.max(axis=1)
        with np.errstate(invalid="ignore"):  # an infinite logit gives NaN, which the caller refuses
            result[rows] = most + np.log(np.exp(wide - most[:, None]).sum(axis=1))
    return result


def negative_log_likelihoods(logits: F32, normalizers: F64, targets: Sequence[int]) -> F64:
    """-ln P(target) of each row of `logits` [n, vocab], in nats: [n]."""
    return normalizers - logits[np.arange(len(targets)), targets]


def kl_divergences(reference: F32, reference_normalizers: F64, logits: F32, normalizers: F64) -> F64:
    """KL(P || Q) of each row, in nats: [n]. P is the softmax of `reference` [n, vocab], Q that of `logits` [n, vocab]."""
    result = np.empty(logits.shape[0], np.float64)
    for rows in _runs(logits.shape[0]):
        log_p = reference[rows] - reference_normalizers[rows, None]
        log_q = logits[rows] - normalizers[rows, None]
        result[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return result


def _runs(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _WIDENED_ROWS, count)) for start in range(0, count, _WIDENED_ROWS))


def mean_and_error(values: F64) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single value."""
    error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else 0.0
    return float(values.mean()), float(error)


# What is found


@dataclass(frozen=True)
class Score:
    """One format's figures over all scored tokens. `nll` is the mean negative log-likelihood, in nats."""

    format: str
    perplexity: float
    perplexity_se: float
    nll: float
    nll_se: float
    seconds: float  # forward passes and output head
    tokens_per_s: float

    @classmethod
    def of(cls, fmt: str, nll: F64, seconds: float) -> Score:
        mean, error = mean_and_error(nll)
        if mean > math.log(sys.float_info.max):
            raise ModelError(f"the mean negative log-likelihood is {mean:.0f} nats: the model is broken; check it")
        perplexity = math.exp(mean)
        return cls(fmt, perplexity, perplexity * error, mean, error, seconds, nll.size / seconds)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || measured) over all scored positions, in nats, and how often both have the same likeliest token."""

    kl_mean: float
    kl_se: float
    kl_max: float
    same_top: float  # share of the positions, 0 to 1

    @classmethod
    def of(cls, kl: F64, same_top: npt.NDArray[np.bool_]) -> Divergence:
        mean, error = mean_and_error(kl)
        return cls(mean, error, float(kl.max()), float(same_top.mean()))


@dataclass
class Result:
    """All of it, as `--report` writes it: score and divergence side by side in one flat object, the reference in another."""

    model: str
    backend: str
    allreduce: str
    sealed: str | None
    text: str
    text_tokens: int
    context: int
    bos: bool
    second_half: bool
    chunks: int
    tokens_scored: int
    score: Score
    reference: Score | None
    divergence: Divergence | None
    load_s: float = 0.0
    ranks: list[RankFigures] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """`against` is null where there was no reference."""
        values = asdict(self)
        score, reference, divergence = (values.pop(name) for name in ("score", "reference", "divergence"))
        ranks = values.pop("ranks")
        against = None if reference is None else {**reference, **divergence}
        return {**values, **score, "against": against, "ranks": ranks}

    def line(self) -> str:
        """The result in one line."""
        line = (
            f"perplexity {self.score.perplexity:.4f} ± {self.score.perplexity_se:.4f} over {self.tokens_scored} tokens"
        )
        if self.reference is not None and self.divergence is not None:
            kl = self.divergence
            line += f"; KL divergence from {self.reference.format} {kl.kl_mean:.3g} ± {kl.kl_se:.2g} nats"
        return line

    def print_table(self) -> None:
        """The table, on stderr."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="none")
        table.add_column("format")
        for name in ("perplexity", "KL mean", "KL largest", "same top token", "tokens/s"):
            table.add_column(name, justify="right")
        for score, kl in ((self.score, self.divergence), (self.reference, None)):
            if score is not None:
                figures = ("", "", "")
                if kl is not None:
                    figures = (f"{kl.kl_mean:.3g} ± {kl.kl_se:.2g}", f"{kl.kl_max:.3g}", f"{kl.same_top:.2%}")
                perplexity = f"{score.perplexity:.4f} ± {score.perplexity_se:.4f}"
                table.add_row(score.format, perplexity, *figures, f"{score.tokens_per_s:.0f}")
        print(file=sys.stderr)
        Console(file=sys.stderr, width=120, highlight=False, color_system=None).print(table)
        where = "in the second halves of" if self.second_half else "in"
        scored = f"{self.tokens_scored} of {self.text_tokens} tokens scored"
        scored += f" {where} {self.chunks} chunks of {self.context}"
        memory = max((rank.peak_rss_bytes for rank in self.ranks), default=0) / 1e6
        print(
            f"{self.model} · {self.backend} · {len(self.ranks)} rank{'s' if len(self.ranks) > 1 else ''} · {scored} · "
            f"load {self.load_s:.2f} s · peak memory {memory:.0f} MB a rank",
            file=sys.stderr,
            flush=True,
        )


# Rank 0's work


class Measurement:
    """A text made ready to be run through one model, or through two in step, the second being the reference."""

    def __init__(
        self,
        engines: Sequence[OpenedEngine],
        tokenizer: Tokenizer | TokenIds,
        name: str,
        text: str,
        *,
        context: int | None,
        max_tokens: int | None,
        second_half: bool = False,
    ) -> None:
        """`name` is the text's file, for messages. Raises InputError where text and context leave nothing to score."""
        self.name = name
        most = engines[0].header.config.context
        if context is not None and context > most:
            raise InputError(f"--context is {context}, this model has {most} positions; give at most that")
        self.context = context or min(CHUNK_POSITIONS, most)
        if second_half and self.context < 3:
            raise InputError(
                f"--context is {self.context}, must be 3 or more with --second-half, so that each half has a token"
            )
        if not text:
            raise InputError(f"the text {name} is empty; give some text")
        self.ids = tokenizer.encode(text, special=False)[:max_tokens]
        if len(self.ids) < 2:
            raise InputError(f"the text {name} has {len(self.ids)} token(s), must have 2 or more; give a longer text")
        adds_bos = tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id]
        self.bos = tokenizer.bos_id if adds_bos else None
        self.second_half = second_half
        self.first = self.context // 2 if second_half else 0  # the first position of a chunk whose logits are scored
        self.chunks = (cut_whole if second_half else cut)(self.ids, self.context, self.bos)
        if not self.chunks:  # of whole ones
            raise InputError(
                f"the text {name} has {len(self.ids)} tokens, less than a chunk of {self.context}, and --second-half scores "
                f"whole chunks; give a longer text, or a smaller --context"
            )

    def run(self, engines: Sequence[Engine], *, quiet: bool) -> Result:
        """Run every chunk through the engines; the other ranks follow. Raises ModelError where logits are not finite."""
        nll: list[list[F64]] = [[] for _ in engines]
        kl: list[F64] = []
        same: list[npt.NDArray[np.bool_]] = []
        seconds = [0.0] * len(engines)
        done, total, said = 0, sum(len(chunk) - 1 - self.first for chunk in self.chunks), time.monotonic()
        for chunk in self.chunks:
            self._begin(engines)
            step = min(engine.model.chunk for engine in engines)
            for start in range(0, len(chunk) - 1, step):
                ids = chunk[start : start + step + 1]
                scored = ids[1:][max(self.first - start, 0) :]
                found: list[tuple[F32, F64]] = []
                for index, engine in enumerate(engines):
                    began = time.monotonic()
                    logits = _last_logits(engine, ids[:-1], start, len(scored))
                    seconds[index] += time.monotonic() - began
                    if not scored:
                        continue
                    normalizers = log_normalizers(logits)
                    nll[index].append(negative_log_likelihoods(logits, normalizers, scored))
                    if not np.isfinite(nll[index][-1]).all():
                        raise ModelError(f"the logits of {engine.opened.header.format} are not finite; check the model")
                    found.append((logits, normalizers))
                if len(found) > 1:
                    kl.append(kl_divergences(*found[1], *found[0]))
                    same.append(found[1][0].argmax(axis=1) == found[0][0].argmax(axis=1))
                done += len(scored)
                if done and not quiet and time.monotonic() - said > _PROGRESS_INTERVAL_S:
                    said = time.monotonic()
                    so_far = math.exp(min(np.concatenate(nll[0]).mean(), 700.0))
                    print(f"{done} of {total} tokens, perplexity so far {so_far:.4f}", file=sys.stderr, flush=True)
        scores = [
            Score.of(engine.opened.header.format, np.concatenate(values), spent)
            for engine, values, spent in zip(engines, nll, seconds, strict=True)
        ]
        header = engines[0].opened.header
        return Result(
            model=header.model,
            backend=engines[0].model.backend.name,
            allreduce=engines[0].model.star.algorithm,
            sealed=engines[0].model.star.sealed,
            text=self.name,
            text_tokens=len(self.ids),
            context=self.context,
            bos=self.bos is not None,
            second_half=self.second_half,
            chunks=len(self.chunks),
            tokens_scored=total,
            score=scores[0],
            reference=scores[1] if len(scores) > 1 else None,
            divergence=Divergence.of(np.concatenate(kl), np.concatenate(same)) if kl else None,
        )

    def _begin(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            begin(engine.model, engine.model.star, self.context)


def _last_logits(engine: Engine, ids: Sequence[int], start: int, count: int) -> F32:
    """Have all ranks run `ids` at positions from `start`: logits of the last `count` of them, [count, vocab]."""
    hidden = forward(engine.model, engine.model.star, engine.embed(ids), start, head=count > 0, prompt=True)
    return engine.model.logits(hidden[len(ids) - count :]) if count else np.empty((0, 0), np.float32)
