"""What the router of a mixture of experts does, beside its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid"]
RouterBias = Literal["none", "logits", "choice"]

SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid")
ROUTER_BIASES: tuple[RouterBias, ...] = ("none", "logits", "choice")


@dataclass(frozen=True)
class RouterSpec:
    """How a position's experts are chosen, and what each counts.

    A position's logits are its normed hidden vector times the router's rows, one for each of `experts`; with `bias`
    "logits" plus the router's bias. Scores are their softmax over all experts, or the sigmoid of each. The `top_k`
    experts are those of the greatest scores, with `bias` "choice" of the greatest score + bias; of equal ones the
    lower index. An expert's weight is its score, without a bias of the choice: where `normalized` over the sum of those
    of the chosen; times `scale`.

    Softmax, normalized: Mixtral (Jiang et al. 2024, arXiv 2401.04088), gpt-oss, Granite. Sigmoid with a bias that only
    chooses: DeepSeek-V3 (arXiv 2412.19437), GLM-4.5.
    """

    experts: int
    top_k: int
    scoring: Scoring
    normalized: bool
    scale: float
    bias: RouterBias
