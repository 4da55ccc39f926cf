"""The notes by which ranks start and end a run together (see startup)."""

from __future__ import annotations

from tpimpi.engine.allotment import MemoryAllotment
from tpimpi.engine.budget import Needs
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.figures import LiveFigures, RankFigures
from tpimpi.star.control import Note
from tpimpi.system.memory import Place


class OpenEngine(Note, frozen=True):
    """Hub: open your slice of this model. The reply is SliceIdentity."""

    settings: EngineConfig


class SliceIdentity(Note, frozen=True):
    """What the slices of a run have in common, as the sender's has it."""

    host: str
    fingerprint: str
    format: str
    shares: str


class PlanMemory(Note, frozen=True):
    """Hub: say what you need for so many positions. Every rank answers with MemoryNeeds."""

    context: int


class MemoryNeeds(Note, frozen=True):
    """What a rank needs, and the memory that its host, cgroups and job have."""

    host: str
    needs: Needs
    places: list[Place]


class MemoryPromises(Note, frozen=True):
    """Hub: for each rank what it may take, in bytes, None where --window decides; and how many ranks there are on its host
    under `--memory auto`, 0 where the host's memory is not to be watched; and how many positions of a prompt are computed at
    once, None where every rank knows that. The reply is Done."""

    promises: list[int | None]
    watched_by: list[int]
    chunk: int | None = None


class Allotted(Note, frozen=True):
    """What the sender's memory buys."""

    allotment: MemoryAllotment


class Live(Note, frozen=True):
    """A rank's figures while the run goes on."""

    figures: LiveFigures


class Figures(Note, frozen=True):
    """A rank's figures, of each of its engines."""

    figures: list[RankFigures]
