"""Tables of what is predicted for machines that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.experiments.tables import Found, Table, command_cell, mb, of_measure, per_token, seconds


def predictions(found: Sequence[Found], folder: Path) -> str:
    table = Table(
        "Machines",
        "assumed of each",
        "ranks",
        "s/token",
        "TTFT, 16 tokens",
        "limited by",
        "memory of each",
        "streamed a token",
        "`… run`",
    )
    for each in of_measure(found, "70b", "predict"):
        for ranks, one in each.figures["ranks"].items():
            table.add(
                *(
                    each["program"],
                    each.figures["assumed"]["why"],
                    ranks,
                    per_token(one["s_per_token"]),
                    seconds(one["ttft_s"]),
                ),
                *(one["limit"], mb(max(one["memory_bytes"], default=0)), mb(sum(one["streamed_bytes_per_token"]))),
                command_cell(each),
            )
    return str(table)


def mixture_predictions(found: Sequence[Found], folder: Path) -> str:
    table = Table(
        *("Machines", "assumed of each", "ranks", "routing", "shares", "experts held", "hits", "read a token of each"),
        *("s/token", "TTFT, 16 tokens", "limited by", "memory of each", "`… run`"),
    )
    for each in of_measure(found, "mixtures", "predict"):
        for ranks in each.figures["ranks"]:
            for routing, by_ranks in (("trace", "ranks"), ("uniform", "uniform")):
                one = each.figures[by_ranks][ranks]
                table.add(
                    *(each["program"], each.figures["assumed"]["why"], ranks, routing, one["shares"]),
                    *(_percents(one["experts_held"]), _percents(one["hits"])),
                    *(_from_to([nbytes / 1e6 for nbytes in one["streamed_bytes_per_token"]], "MB"),),
                    *(per_token(one["s_per_token"]), seconds(one["ttft_s"]), one["limit"]),
                    *(mb(max(one["memory_bytes"])), command_cell(each)),
                )
    return str(table)


def _percents(parts: Sequence[float]) -> str:
    return _from_to([100 * part for part in parts], "%")


def _from_to(numbers: Sequence[float], unit: str) -> str:
    """The least and the greatest, where they differ."""
    least, greatest = (f"{number:.0f}" for number in (min(numbers), max(numbers)))
    return f"{least if least == greatest else f'{least} to {greatest}'} {unit}"
