"""The header of a slice file, as JSON (specified in the package): written, and read back with nothing taken on trust."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from typing import Any

from tpimpi import __version__
from tpimpi.models.blocks import Block
from tpimpi.models.config import ModelConfig
from tpimpi.models.keys import show
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.slices.layout import NONE, Part, Record, slice_records
from tpimpi.weights.slices.partition import Partition, Share, Span, make_partition

FORMAT_VERSION = 2
_MAX_TOKENIZER_BYTES = 2**30


@dataclass(frozen=True)
class Header:
    """What a slice file says of itself."""

    rank: int
    formats: ModelFormats
    model: str
    fingerprint: str
    config: ModelConfig
    partition: Partition
    records: tuple[Record, ...]
    made_by: str = __version__

    @property
    def format(self) -> str:
        """The formats of the weights, as a short text."""
        return self.formats.describe()

    @property
    def share(self) -> Share:
        return self.partition.shares[self.rank]

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "tpimpi_slice": FORMAT_VERSION,
                "made_by": self.made_by,
                "rank": self.rank,
                "formats": self.formats.to_dict(),
                "model": self.model,
                "fingerprint": self.fingerprint,
                "config": self.config.to_dict(),
                "plan": {
                    "weights": self.partition.proportions,
                    "shares": [_share_to_json(share, self.config) for share in self.partition.shares],
                },
                "tiles": [_record_to_json(record) for record in self.records],
            }
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Header:
        """Undo `to_json`, and refuse what no slicing writes: partition and tiles are made again and must be the same.

        Raises InputError or ValueError (naming the version, where it is another), KeyError, TypeError.
        """
        values = json.loads(text)
        if type(values["tpimpi_slice"]) is not int or values["tpimpi_slice"] != FORMAT_VERSION:
            raise ValueError(f"slice format version {show(values['tpimpi_slice'])}, this tpimpi reads {FORMAT_VERSION}")
        config = ModelConfig.from_dict(values["config"])
        for name in ("made_by", "model", "fingerprint"):
            if not isinstance(values[name], str):
                raise ValueError(f"{name} is {show(values[name])}, must be a text")
        formats = ModelFormats.from_dict(values["formats"], config.layers)
        partition, rank = _partition_from_json(values["plan"], config), values["rank"]
        if type(rank) is not int or not 0 <= rank < partition.ranks:
            raise ValueError(f"rank is {show(rank)} of {partition.ranks}")
        return cls(
            rank=rank,
            formats=formats,
            model=values["model"],
            fingerprint=values["fingerprint"],
            config=config,
            partition=partition,
            records=_records_from_json(values["tiles"], config, partition.shares[rank], rank, formats),
            made_by=values["made_by"],
        )


def _record_to_json(record: Record) -> dict[str, Any]:
    values: dict[str, Any] = {
        "path": record.path,
        "block": record.block,
        "parts": [_part_to_json(part) for part in record.parts],
    }
    if record.block.kind in ("qkv", "attn"):
        values |= {"heads": record.heads, "kv_heads": record.kv_heads, "q_to_kv": record.q_to_kv}
    if record.expert >= 0:
        values["expert"] = record.expert
    return values


def _share_to_json(share: Share, config: ModelConfig) -> list[Span]:
    """Those of experts stand at the end, and only where there are experts."""
    experts = [share.expert_columns, share.shared_columns] if config.experts else []
    return [share.heads, share.kv_heads, share.columns, *experts]


def _part_to_json(part: Part) -> list[Any]:
    """Where in a block of 256 a part begins stands at the end, and only where that is not at its begin."""
    return [part.name, part.format, part.shape, *([part.first] if part.first else [])]


def _record_from_json(values: dict[str, Any]) -> Record:
    return Record(
        path=values["path"],
        block=Block(*values["block"]),
        parts=tuple(Part(name, form, tuple(shape), *more) for name, form, shape, *more in values["parts"]),
        heads=Span(*values.get("heads", (0, 0))),
        kv_heads=Span(*values.get("kv_heads", (0, 0))),
        q_to_kv=tuple(values.get("q_to_kv", ())),
        expert=values.get("expert", -1),
    )


def _partition_from_json(values: dict[str, Any], config: ModelConfig) -> Partition:
    """The partition that the weights in the header give; raises ValueError where the shares beside them are others."""
    weights = values["weights"]
    if not isinstance(weights, list) or not all(type(weight) in (int, float) for weight in weights):
        raise ValueError(f"weights are {show(weights)}, must be numbers")
    partition = make_partition(config, weights)
    if partition.shares != tuple(Share(*(Span(*span) for span in share)) for share in values["shares"]):
        raise ValueError("its shares do not fit its plan")
    return partition


def _records_from_json(
    values: list[dict[str, Any]], config: ModelConfig, share: Share, rank: int, formats: ModelFormats
) -> tuple[Record, ...]:
    """The tiles that this rank must have; raises ValueError where the header's differ in any way."""
    tokenizer = _tokenizer_sizes(_record_from_json(values[-1])) if rank == 0 else {}
    records = []
    wanted = slice_records(config, share, rank, formats, tokenizer)
    for found, record in itertools.zip_longest(values, wanted):  # no further than the first that is missing
        if found is None or record is None or _record_from_json(found) != record:
            raise ValueError("its tiles do not fit its plan")
        records.append(record)
    return tuple(records)


def _tokenizer_sizes(record: Record) -> dict[str, int]:
    """Sizes of the tokenizer's files by name: all that a header may choose by itself."""
    sizes: dict[str, int] = {}
    for part in record.parts:
        size = part.shape[0] if len(part.shape) == 1 else None
        name = part.name
        if not isinstance(name, str) or not name or not name.isprintable() or "/" in name or name in sizes:
            raise ValueError(f"a tokenizer file is named {show(name)}")
        if type(size) is not int or not 0 <= size <= _MAX_TOKENIZER_BYTES:
            raise ValueError(f"tokenizer file {name} has {show(part.shape)} bytes")
        sizes[name] = size
    return sizes


def same_slice(one: Header, other: Header) -> bool:
    """Whether two slices hold the same tiles of the same model, whatever it was called and which version made them."""
    return dataclasses.replace(one, made_by=other.made_by, model=other.model) == other


def tile_spans(header: Header) -> list[Span]:
    """For each record, the columns of the MLP or the rows of the head that the tile has (none, where it is neither)."""
    spans, at, block = [], 0, None
    for record in header.records:
        kind = record.block.kind
        if kind == "experts":
            spans.append(header.share.expert_columns)
            continue
        if kind not in ("mlp", "head"):
            spans.append(NONE)
            continue
        if record.block != block:
            block = record.block
            at = header.share.mlp_columns(header.config, block.layer).start if kind == "mlp" else 0
        spans.append(Span(at, at + record.parts[0].shape[0]))
        at = spans[-1].stop
    return spans
