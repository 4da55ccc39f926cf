"""What a run says to its user on stderr, beside the answer: lines, or None where there is nothing to say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tpimpi.cli.options import ModelOptions
from tpimpi.cli.process import Job
from tpimpi.serving.llm import LLM
from tpimpi.serving.report import shown_speculation
from tpimpi.serving.session import Session
from tpimpi.serving.transcript import Transcript, Turn
from tpimpi.system.terminal import STDERR, has_input, is_terminal
from tpimpi.weights.locations import model_path

MAX_PROMPT_CHARACTERS = 60  # characters of a prompt that is named in a line


def loading(model: ModelOptions) -> str | None:
    """Said at a terminal before the model is loaded, which may take minutes. Raises ModelError where there is no model."""
    if not is_terminal(STDERR):
        return None
    path = Path(model.slices) if model.slices is not None else model_path(model.model)
    return f"loading {path.name.removesuffix('.gguf')} …"


def going_on(session: Transcript | None, turn: Turn) -> str | None:
    """Said before an answer that an earlier run left unfinished. Its prompt is named at a terminal only: what else takes
    stderr, the log of a batch job say, others may read."""
    if session is None or turn is not session.unfinished:
        return None
    if not is_terminal(STDERR):
        return "going on with the answer that was broken off"
    return f"going on with the answer to {shown_prompt(turn)}"


def other_system(session: Session, system: str | None) -> str | None:
    """Said where --system differs from the system prompt that a conversation had so far."""
    if system is None or not session.turns or session.system == system:
        return None
    return (
        f"the conversation in {session.path} had {'another' if session.system else 'no'} system prompt: now it has this"
    )


def left_out(turns: int) -> str | None:
    """Said where the model no longer gets so many turns, besides those that it did not get before."""
    if not turns:
        return None
    return f"the context is full: the model no longer gets the oldest {show_number(turns, 'turn')}"


def show_number(number: int, thing: str) -> str:
    """So many of a thing, in the singular or plural."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def kept(session: Session) -> str | None:
    """Said when a run is ended by a signal."""
    if not session.turns:
        return None
    return f"the conversation is kept in {session.path}; the same --session goes on with it"


def computed_again(problem: str) -> str:
    """Said where what --keep-cache kept of a conversation cannot be used."""
    return f"the conversation so far is computed again: {problem}"


def not_kept(job: Job, problem: str) -> str:
    """Said where --keep-cache could not keep what the ranks have."""
    return f"{job.name()}: keys and values are not kept, the next run computes them again: {problem}"


def shown_prompt(turn: Turn) -> str:
    """A turn's prompt, in a line."""
    more = "…" if len(turn.prompt) > MAX_PROMPT_CHARACTERS else ""
    return repr(turn.prompt[:MAX_PROMPT_CHARACTERS] + more)


def figures(llm: LLM, transcript: Transcript) -> Iterator[str]:
    """What /stats says: of the conversation, and of the last answer."""
    turns, conversation = transcript.turns, llm.conversation
    used = len(turns[-1].ids) + len(turns[-1].tokens) if turns else 0
    left_out = f", {transcript.left_out} of them left out" if transcript.left_out else ""
    yield f"{show_number(len(turns), 'turn')}{left_out}; {used} of {conversation.limit} positions of the context"
    if not (answers := llm.report.answers):
        return
    last = answers[-1]
    line = f"last answer: {last.prompt_tokens} prompt tokens, {last.cached_tokens} of them computed before; "
    line += f"{len(last.token_ids)} generated; {last.rows_computed} rows computed"
    if last.ttft_s is not None:
        line += f"; first token {last.ttft_s:.2f} s"
    if last.s_per_token_mean is not None:
        line += f", then {last.s_per_token_mean:.3g} s/token"
    yield line
    if last.drafted_tokens:
        yield f"speculation: {shown_speculation(last)}"


def why_cut(llm: LLM, turn: Turn) -> str | None:
    """What to say of an answer that ends in mid-sentence; None of one that is whole."""
    conversation = llm.conversation
    if turn.ended == "cancelled":
        kept = (
            "what was said is kept, /undo takes it back" if turn.tokens else "nothing was said, so the turn is not kept"
        )
        return f"stopped; {kept}, /retry answers anew"
    if turn.ended == "max_tokens":
        most = conversation.params.max_tokens
        where = ", in its reasoning" if turn.reasoning and not turn.text else ""
        return f"the answer was cut at --max-tokens {most}{where}; give more to have it whole"
    if turn.ended == "context":
        raised = " or raise --context" if conversation.params.context is not None else ""
        return f"the answer was cut at the end of the context, {conversation.limit} positions; ask for less{raised}"
    return None


def tools_not_called(turn: Turn) -> str | None:
    """What to say of an answer that calls tools."""
    if not turn.tools:
        return None
    return (
        f"the answer calls {', '.join(dict.fromkeys(turn.tools))}; tpimpi calls no tools, the call is in the reasoning"
    )


def unread(job: Job) -> str | None:
    """What to say where the prompt is an option's and standard input, a file or a pipe, has something in it."""
    if job.input is None:
        return "standard input was not read: the prompt is an option's" if has_input() else None
    if not job.input.received:
        return None
    return (
        "standard input was taken by mpirun and not used, as the prompt is an option's; where a loop reads it, start mpirun "
        "with </dev/null"
    )


def batch_progress(answered: int, prompts: int) -> str:
    """How far a batch is."""
    return f"{answered} of {prompts} prompts answered"


def batch_goes_on(answered: int, prompts: int) -> str:
    """What is to be said where a batch is ended before its end."""
    return f"{answered} of {prompts} prompts are answered; the same command goes on there"


def room_for_pages(positions: int, parallel: int) -> str:
    """How many positions there are KV pages for."""
    return f"keys and values: room for {positions} positions of all prompts together, up to {parallel} at once"


def short_of_pages(positions: int) -> str:
    """Where a prompt had to give its KV pages to others."""
    return (
        f"keys and values of {positions} positions are too few for all that are answered at once: some prompts wait, and "
        "are computed again; a smaller --parallel, --kv q8_0 or more --memory avoids that"
    )
