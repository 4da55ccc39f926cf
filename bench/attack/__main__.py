"""The attacks as a command.

python -m bench.attack messages FILE [--model PATH] [--wire f32]   what a rank's messages tell (see bench.attack.record)
python -m bench.attack frames FILE.pcap [--model PATH] [--wire f32]     what frames between two machines tell
python -m bench.attack table [--mpi openmpi,mpich] [--wires f32,bf16,q8_0] [--links plain,sealed] [--tokens 24]
                             [--after-layer 8] [--json FILE]      ten conversations over the emulated home; as root
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from bench.attack.frames import streams
from bench.attack.messages import read_messages
from bench.attack.public import PublicModel
from bench.attack.rows import RowIndex
from bench.attack.runs import home_with_keys, make_slices, record_run
from bench.attack.table import (
    CONVERSATIONS,
    Outcome,
    Table,
    as_markdown,
    as_objects,
    tokens_of_bytes,
    tokens_of_sums,
    tokens_of_vectors,
)
from tpimpi.errors import TpimpiError
from tpimpi.star import WIRES
from tpimpi.weights.locations import model_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = parser.add_subparsers(dest="what", required=True)
    for name in ("messages", "frames"):
        of = whats.add_parser(name)
        of.add_argument("file", type=Path)
        of.add_argument("--wire", choices=WIRES, default="f32")
        of.add_argument("--model")
    table = whats.add_parser("table")
    table.add_argument("--mpi", default="openmpi,mpich")
    table.add_argument("--wires", default=",".join(WIRES))
    table.add_argument("--links", default="plain,sealed")
    table.add_argument("--tokens", type=int, default=24, help="of each answer")
    table.add_argument("--after-layer", type=int, default=8, help="of the first conversation, by its residuals; 0: not")
    table.add_argument("--json", type=Path)
    table.add_argument("--model")
    return parser


def _show(options: argparse.Namespace, model: PublicModel) -> None:
    """What can be read in one file."""
    if options.what == "frames":
        index = RowIndex(model.table_on_the_wire(options.wire))
        parts = [part for parts in streams(options.file).values() for part in parts]
        tokens = tokens_of_bytes(parts, index)
        print(f"{len(tokens)} rows in {sum(map(len, parts))} bytes: {model.text(tokens)}")
        return
    messages = list(read_messages(options.file))
    tokens = tokens_of_vectors(messages, options.wire, model)
    print(f"{len(tokens)} rows in {len(messages)} messages: {model.text(tokens)}")
    answer = tokens_of_sums(messages, options.wire, model)
    print(f"{len(answer)} next tokens in the sums: {model.text(answer)}")


def _table(options: argparse.Namespace, model: PublicModel) -> list[Outcome]:
    prompts, outcomes = CONVERSATIONS.read_text().splitlines(), []
    table = Table(model, prompts, options.after_layer)
    with tempfile.TemporaryDirectory() as name, home_with_keys(Path(name)) as home:
        slices = make_slices(model.path, Path(name) / "slices")
        for mpi in options.mpi.split(","):
            for wire in options.wires.split(","):
                for links in options.links.split(","):
                    sealed, folder = links == "sealed", Path(name) / "run"
                    recording = record_run(
                        home, folder, slices, prompts, mpi=mpi, wire=wire, sealed=sealed, tokens=options.tokens
                    )
                    if recording.lost_frames:
                        raise SystemExit(f"{recording.lost_frames} frames were not captured; try again")
                    for outcome in table.attack(recording, mpi, wire, sealed=sealed):
                        print(f"{mpi} {wire} {links}: {outcome.attack}: {outcome.right} of {outcome.total}", flush=True)
                        outcomes.append(outcome)
                    shutil.rmtree(folder)
    return outcomes


def main() -> None:
    options = _parser().parse_args()
    try:
        model = PublicModel(model_path(options.model))
        if options.what != "table":
            _show(options, model)
            return
        outcomes = _table(options, model)
    except TpimpiError as error:
        print(f"attack: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"\n{as_markdown(outcomes)}")
    if options.json:
        options.json.write_text(json.dumps(as_objects(outcomes), indent=1) + "\n")


if __name__ == "__main__":
    main()
