"""The small model of --draft: opened on rank 0 alone, with slices for one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tpimpi.cli.options import ModelOptions, RunOptions
from tpimpi.cli.prepare import prepare
from tpimpi.engine import startup
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.ranks import RankInfo, cores_shared_by
from tpimpi.serving.draft_model import check_vocabulary
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.star import Star
from tpimpi.system.memory import release_freed_memory


def open_draft(
    ranks: Sequence[RankInfo], options: RunOptions, tokenizer: Tokenizer | TokenIds, model: str, parallel: int = 1
) -> OpenedEngine:
    """The model that --draft names, for `model`, whose `tokenizer` this is; its slices are made where they are not there.
    It drafts for so many sequences at once.

    Raises InputError where it cannot draft for that."""
    alone = Star(None)
    compute = replace(options.compute, memory=None, window="all", prompt_chunk=None, predict=None)
    network = replace(options.network, allreduce="star", wire="f32")
    of_draft = ModelOptions(model=options.generate.draft)
    config = prepare(*(alone, ranks[:1], of_draft, compute, network), context=None, quiet=options.output.quiet)
    config = replace(config, cores_shared_by=cores_shared_by(ranks)[:1], parallel=parallel)
    release_freed_memory()
    draft = startup.open_engines(alone, config)
    try:
        check_vocabulary(draft, tokenizer, model)
    except BaseException:
        draft.close()
        raise
    return draft
