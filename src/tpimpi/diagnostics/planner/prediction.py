"""What a plan would take, as it is predicted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Of one plan: times in seconds, memory in bytes for each rank. Where it cannot work `problem` says why, and the times
    are infinite."""

    shares: str
    s_per_token: float
    first_token_s: float
    compute_s: float  # of a token, on the path: the slowest rank's blocks
    star_s: float
    head_s: float
    disk_s: float  # the longest that a rank's reading takes
    processor_s: float  # the same of its processor time over the processors that it gets
    limit: str  # "compute", "star", "processor", "disk" or "memory"
    limit_rank: int  # whose; of the star 0
    memory: tuple[int, ...]
    streamed: tuple[int, ...]  # read for each token, experts among it
    problem: str = ""
    experts: tuple[ExpertsHeld, ...] = ()  # of a mixture, for each rank
    prompt_chunk: int = 0  # positions of a prompt that are computed at once
    tokens_per_s: float = 0.0  # of all sequences together, where there are several; 0 where they have no memory
    drafted_s_per_token: float = 0.0  # with the draft that is best at the workload's rate; 0 where there is no rate
    draft: int = 0  # tokens of that draft; 0: none pays
    drafted_streamed: tuple[int, ...] = ()  # of each rank, read for each token while a draft model has its memory


@dataclass(frozen=True)
class ExpertsHeld:
    """What a rank's expert cache does: how many experts it has room for, of how many, and for a token the part of uses that
    hit, the bytes of chosen experts, and those of them that are read."""

    held: int
    of: int
    hits: float
    used_bytes: int
    read_bytes: int
