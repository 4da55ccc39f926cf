"""How fast a model is sliced, beside the rate at which the disk takes a file of the same size.

    python -m bench.studies.slicing MODEL [--format auto] [--ranks 2] [--out DIR] [--threads N] [--rounds 3]

In turn: the slices are made in DIR, and as many bytes are written there and synchronized. A row each: bytes, seconds,
MB/s, of slicing also the processor's seconds and the memory at its highest. Slices and file are removed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from pathlib import Path

from tpimpi.compute.backends import load_quantizer
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

_PIECE_BYTES = 4 << 20


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("slicing-study"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    try:
        for _ in range(options.rounds):
            began, used = time.perf_counter(), time.process_time()
            nbytes = slices(options)
            used = time.process_time() - used
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"slices {rate(nbytes, began)}; {used:.2f} s of the processor, {memory:.0f} MiB at most", flush=True)
            began = time.perf_counter()
            write(options.out / "file", nbytes)
            print(f"disk   {rate(nbytes, began)}", flush=True)
    finally:
        shutil.rmtree(options.out)


def slices(options: argparse.Namespace) -> int:
    """Make the slices; their bytes."""
    folder, quantizer = options.out / "slices", load_quantizer(options.threads)
    with open_source(options.model) as source:
        partition = make_partition(source.config, [1] * options.ranks)
        slice_model(source, partition, choose_formats(source, options.format), folder, quantizer=quantizer)
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return nbytes


def write(path: Path, nbytes: int) -> None:
    """Write a file of random bytes, and have it on the disk."""
    piece = os.urandom(_PIECE_BYTES)
    with path.open("wb") as file:
        for first in range(0, nbytes, len(piece)):
            file.write(piece[: nbytes - first])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def rate(nbytes: int, began: float) -> str:
    """Bytes, seconds since `began`, and the one by the other."""
    seconds = time.perf_counter() - began
    return f"{nbytes / 1e6:.0f} MB in {seconds:.2f} s, {nbytes / seconds / 1e6:.0f} MB/s"


if __name__ == "__main__":
    main()
