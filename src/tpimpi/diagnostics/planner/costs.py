"""What was measured of ranks: seconds by bytes, of layers, and of ranks that were at work together."""

from __future__ import annotations

from dataclasses import dataclass

from tpimpi.system.memory import Place


@dataclass(frozen=True)
class LinearCost:
    """Seconds for so many bytes: fixed + per_byte * bytes."""

    fixed: float
    per_byte: float

    def seconds(self, nbytes: float) -> float:
        """Seconds for so many bytes."""
        return self.fixed + self.per_byte * nbytes

    def interpolate(self, other: LinearCost, part: float) -> LinearCost:
        """So far from this line (0) to the other (1)."""
        return LinearCost(
            self.fixed + (other.fixed - self.fixed) * part,
            self.per_byte + (other.per_byte - self.per_byte) * part,
        )

    @classmethod
    def fit(cls, first: tuple[float, float], second: tuple[float, float]) -> LinearCost:
        """Through two points (bytes, seconds), as far as neither the fixed part nor the slope is negative."""
        (x1, y1), (x2, y2) = sorted((first, second))
        if x2 <= x1 or y2 <= y1:
            return cls((y1 + y2) / 2, 0.0)
        slope = (y2 - y1) / (x2 - x1)
        if y1 < slope * x1:
            return cls(0.0, y2 / x2)
        return cls(y1 - slope * x1, slope)


@dataclass(frozen=True)
class LayerCost:
    """What a layer takes on a rank, with so many positions at once: seconds, and processor seconds, waiting included."""

    wall: LinearCost
    cpu: LinearCost

    def interpolate(self, other: LayerCost, part: float) -> LayerCost:
        return LayerCost(self.wall.interpolate(other.wall, part), self.cpu.interpolate(other.cpu, part))


@dataclass(frozen=True)
class RankSpeed:
    """What one rank can do while the others are at work too. `processors` are those that it gets in the long run."""

    host: str
    token: LayerCost  # one position
    chunk: LayerCost  # `Measured.positions` at once
    processors: float
    base: int  # bytes that it has resident without a model
    places: tuple[Place, ...]  # memory that it shares
    threads: int = 1
    backend: str = "native"
    disk_bytes_per_s: float = 0.0  # 0 where it was not measured
    read_cpu_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What was measured of ranks that were at work together, in rank order."""

    ranks: tuple[RankSpeed, ...]
    positions: int  # of a chunk
    allreduce_s: float  # of one position, from the slowest rank's partial to its sum
    allreduce_chunk_s: float
    head: LinearCost  # rank 0's, of one position
    head_cpu: LinearCost
    allreduce: str = "star"  # the rule by which a run makes its sums
