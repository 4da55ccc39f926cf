"""All targets, by name."""

from __future__ import annotations

from tests.fuzz import files, models, ranks, requests, texts
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (*models.TARGETS, *texts.TARGETS, *files.TARGETS, *ranks.TARGETS, *requests.TARGETS)
}
