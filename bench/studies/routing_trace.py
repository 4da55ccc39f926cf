"""Make a trace of routing: which experts each layer chose for each position, uint16 [positions, layers, chosen], as .npy.

    python -m bench.studies.routing_trace trace.npy --experts 128 --chosen 4 --layers 36 --positions 400

No package brings the routing of a real mixture. What was measured of one (54,000 records of a model of 512 experts): an LRU
of 64 experts of a layer hits 67 %, one of 128 hits 81 %, and a static list of the 32 hottest 10 % (uniform: 6 %). So each
choice is drawn by its distance in the layer's LRU order: a share f of the experts misses 0.33 (8 f)^-0.796, which goes
through both points, at the same shares for other numbers of experts. `--kind` has others: `uniform` draws every expert with
equal chance, `same` always takes the same ones, and `cycle` those that were not used for the longest time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

_EIGHTH_MISSES, _EXPONENT = 0.33, 0.796  # 0.33 / 2^0.796 = 0.19

KINDS = ("drawn", "uniform", "same", "cycle")

RoutingTrace = npt.NDArray[np.uint16]


def make_trace(
    experts: int, chosen: int, layers: int, positions: int, seed: int, *, kind: str = "drawn"
) -> RoutingTrace:
    """uint16 [positions, layers, chosen]; the experts of a position differ."""
    assert kind in KINDS
    if kind in ("same", "cycle"):
        first = np.arange(positions)[:, None, None] * (chosen if kind == "cycle" else 0)
        numbers = (first + np.arange(chosen)) % experts
        return np.broadcast_to(numbers, (positions, layers, chosen)).astype(np.uint16)
    dice = np.random.default_rng(seed)
    made = np.empty((positions, layers, chosen), np.uint16)
    shares = np.arange(1, experts + 1) / experts
    hits = 1 - np.minimum(1.0, _EIGHTH_MISSES * (8 * shares) ** -_EXPONENT)
    for layer in range(layers):
        recent = dice.permutation(experts).tolist()  # the one used last comes first
        for position in range(positions):
            picked: list[int] = []
            while len(picked) < chosen:
                place = int(np.searchsorted(hits, dice.random()))
                if kind == "uniform" or place >= experts:
                    place = int(dice.integers(experts))
                if recent[place] not in picked:
                    picked.append(recent[place])
            recent = [*picked, *(expert for expert in recent if expert not in picked)]
            made[position, layer] = picked
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--positions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, default="drawn")
    options = parser.parse_args()
    shape = (options.experts, options.chosen, options.layers, options.positions, options.seed)
    np.save(options.file, make_trace(*shape, kind=options.kind))


if __name__ == "__main__":
    main()
