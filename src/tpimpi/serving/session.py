"""A conversation in a file (--session), kept token by token, so that a run that was ended in mid-answer can be continued.

The file is text in UTF-8, a JSON object a line, and grows only at its end; each line is written at once. Whatever ends the
program leaves whole lines, and at most a last one without its line end, which counts for nothing and is cut off. Lines:

    {"tpimpi session": 1, "model": "NAME", "fingerprint": "HEX", "vocabulary": N, "options": {"temperature": 0.0, …}}
    {"prompt": "TEXT", "ids": [1, 2], "seed": N}      a turn begins
    {"token": 3}                                      a token of its answer
    {"end": "end", "text": "TEXT"}                    the answer is done

Of a model whose answers may have reasoning, a session is of version 2, and all its last lines of a turn have that apart:

    {"end": "end", "text": "TEXT", "reasoning": "TEXT"}

With one of these lines the session, whatever it was before, becomes one of version 3, which may have "reasoning" or not:

    {"system": "TEXT"}                                the system prompt of the turns from here on; null for none
    {"undo": N}                                       the N turns before this line no longer count
    {"end": "cancelled", "text": "TEXT"}              the answer was stopped by its user

The first line is there once, as soon as there is a turn: the version of this format, the model (its fingerprint, and how
many token ids it has), and the options of SAMPLING, which hold for the whole conversation; without --seed "seed" is null.
Of a turn, "ids" is all that the model gets before the answer, what was said before included, and "seed" what its random
draws begin with. "end" is "end" (the model's own end of text), "stop" (one of --stop; "text" ends before it, the tokens
do not), "max_tokens", "context" (no room is left), or "cancelled". A turn without a line "end" was interrupted.

One run at a time uses a file, which a lock (flock) sees to. Only its owner can read it. Only rank 0 knows of it.

With a passphrase each line is sealed as `sealed_lines` has it; such a session is of version 3 from its first line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpimpi.errors import StorageError
from tpimpi.serving.record_file import RecordFile, sealed
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.sealed_lines import LineSeal
from tpimpi.serving.transcript import END_REASONS, Transcript, Turn
from tpimpi.system.files import replacing

FORMAT_VERSION, REASONING_VERSION, CHANGED_VERSION = 1, 2, 3
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "raw")  # options of a run
_FIRST_LINE_START = b'{"tpimpi session": '  # before the version
_FIRST_LINE_TYPES: dict[str, type | None] = {  # what it holds
    "tpimpi session": int,
    "model": str,
    "fingerprint": str,
    "vocabulary": int,
    "options": dict,
}


MAX_LINE_BYTES = 1 << 25  # of the longest prompt with its ids, sealed, 17 MB


class Session(Transcript):
    """A conversation in a file, which is locked; with a `passphrase` it is encrypted."""

    def __init__(self, given: str, option: str = "--session", passphrase: bytes | None = None) -> None:
        """Open the file that `option` gives, or make it.

        Raises InputError, having changed nothing, where it is no session or is in use."""
        super().__init__()
        self._records = RecordFile(given, "session", option, "--session-key-file", passphrase, MAX_LINE_BYTES)
        self._header: dict[str, Any] | None = None
        self._new_header: dict[str, Any] = {}  # a first line to be written
        self.keep_reasoning(False)
        self._system: str | None = None  # as the file has it
        self._records.open(lambda line: self._take(json.loads(line)))

    @property
    def path(self) -> Path:
        return self._records.path

    @property
    def passphrase(self) -> bytes | None:
        return self._records.passphrase

    # Reading

    def _take(self, value: dict[str, Any]) -> None:
        """One line of the file. Raises ValueError, KeyError or TypeError where it is not what comes next."""
        if self._header is None:
            if (version := value["tpimpi session"]) not in (FORMAT_VERSION, REASONING_VERSION, CHANGED_VERSION):
                ours = f"this tpimpi knows versions {FORMAT_VERSION} to {CHANGED_VERSION}"
                remedy = "use the one that made the file, or give another file"
                raise self._records.wrong(f" is of format version {version}, {ours}; {remedy}")
            if self.passphrase is not None and version != CHANGED_VERSION:  # which cannot be changed in its place
                raise ValueError(value)
            _require(value, _FIRST_LINE_TYPES)
            _require(value["options"], {**dict.fromkeys(SAMPLING), "raw": bool})
            make_sampler(**{name: value["options"][name] for name in SAMPLING if name != "raw"})
            self._header = value
            return
        turn, changed = self.unfinished, self._version == CHANGED_VERSION
        if changed and "undo" in value:
            _require(value, {"undo": int})
            if not 1 <= value["undo"] <= len(self.turns):
                raise ValueError(value)
            super().undo(value["undo"])
        elif changed and turn is None and "system" in value:
            _require(value, {"system": None if value["system"] is None else str})
            (value["system"] or "").encode()
            self.system = self._system = value["system"]
        elif turn is None:
            _require(value, {"prompt": str, "ids": list, "seed": int})
            value["prompt"].encode()  # a ValueError where it is not Unicode
            if not value["ids"] or value["seed"] < 0:
                raise ValueError(value)
            self.turns.append(Turn(value["prompt"], [self._id(number) for number in value["ids"]], value["seed"]))
        elif "token" in value:
            _require(value, {"token": int})
            turn.tokens.append(self._id(value["token"]))
        else:
            texts = ("text", "reasoning") if self._keeps_reasoning("reasoning" in value) else ("text",)
            _require(value, {"end": str, **dict.fromkeys(texts, str)})
            for name in texts:
                value[name].encode()
            if value["end"] not in (END_REASONS if changed else END_REASONS[:-1]):
                raise ValueError(value)
            turn.ended, turn.text = value["end"], value["text"]
            turn.reasoning = value.get("reasoning", "")

    def _id(self, number: object) -> int:
        assert self._header is not None
        if type(number) is not int or not 0 <= number < self._header["vocabulary"]:
            raise ValueError(number)
        return number

    # What has to be the same throughout a conversation

    def options(self, given: Mapping[str, Any], parsed: Mapping[str, Any]) -> dict[str, Any]:
        """The options of SAMPLING that hold: those of the session, or for a new one those `parsed`.

        Raises InputError for one that the user has `given` (not None) and that is not the session's.
        """
        if self._header is None:
            self._new_header["options"] = {name: parsed[name] for name in SAMPLING}
            return dict(self._new_header["options"])
        options: dict[str, Any] = self._header["options"]
        for name in SAMPLING:
            if (value := given.get(name)) is not None and value != options[name]:
                option, begun = f"--{name.replace('_', '-')}", options[name]
                found, wanted = f"{option} is {value}", f"with {begun}"
                if isinstance(value, bool) or begun is None:
                    found, wanted = f"{option} is given", "without it"
                remedy = f"leave {option} out, or give another file"
                raise self._records.wrong(f": {found}, and the conversation was begun {wanted}; {remedy}")
        return dict(options)

    def check_model(self, name: str, fingerprint: str, vocabulary: int) -> None:
        """Raise InputError where the conversation was begun with another model."""
        ours: dict[str, Any] = {"model": name, "fingerprint": fingerprint, "vocabulary": vocabulary}
        self._new_header |= ours
        if self._header is None:
            return
        theirs = self._header
        if (theirs["fingerprint"], theirs["vocabulary"]) != (fingerprint, vocabulary):
            shown = [f"{m['model']} ({m['vocabulary']} token ids, {m['fingerprint'][:12]})" for m in (theirs, ours)]
            remedy = "give that model, or another file"
            raise self._records.wrong(f" was begun with the model {shown[0]}, this run has {shown[1]}; {remedy}")

    def keep_reasoning(self, kept: bool) -> None:
        """Whether a new conversation keeps its answers' reasoning; one that was begun stays as it is."""
        version = REASONING_VERSION if kept else FORMAT_VERSION
        self._new_header["tpimpi session"] = version if self.passphrase is None else CHANGED_VERSION

    def _keeps_reasoning(self, there: bool) -> bool:
        """Whether a line with the end of an answer has its reasoning: from version 3 on where it is `there`."""
        return self._version == REASONING_VERSION or (self._version == CHANGED_VERSION and there)

    @property
    def _version(self) -> int:
        version: int = (self._header or self._new_header)["tpimpi session"]
        return version

    # Writing

    def begin(self, turn: Turn) -> None:
        """A turn begins; one that was interrupted goes on. A system prompt is written with the first turn that has it."""
        if turn is self.unfinished:
            return
        lines = b"" if self.system == self._system else _line({"system": self.system})
        if lines:
            self._change_version()
        lines += _turn_lines(turn)
        if self._header is None:
            self._header = {key: self._new_header[key] for key in _FIRST_LINE_TYPES}
            lines = _line(self._header) + lines
        self._write(lines)
        self._system = self.system
        super().begin(turn)

    def add(self, token: int) -> None:
        """The last turn's answer has one more token."""
        self._write(_token_line(token))
        super().add(token)

    def end(self, why: str, text: str, reasoning: str = "") -> None:
        """The last turn's answer is done, for one of END_REASONS."""
        if why == "cancelled":
            self._change_version()
        self._write(_end_line(why, text, reasoning if self._keeps_reasoning(bool(reasoning)) else None))
        super().end(why, text, reasoning)

    def undo(self, turns: int = 1) -> None:
        """The last so many turns no longer count; the file still has their lines."""
        self._change_version()
        self._write(_line({"undo": turns}))
        super().undo(turns)

    def _change_version(self) -> None:
        """From now on the file may have lines that older versions of the format do not."""
        if self._header is not None and self._version != CHANGED_VERSION:
            try:
                # In the place of one digit.
                self._records.lines.overwrite(len(_FIRST_LINE_START), b"%d" % CHANGED_VERSION)
            except OSError as error:
                raise StorageError(f"cannot write --session {self.path}: {error.strerror}; look at its disk") from error
        (self._new_header if self._header is None else self._header)["tpimpi session"] = CHANGED_VERSION

    def _write(self, lines: bytes) -> None:
        """Append to the file, after its whole lines. Raises StorageError."""
        try:
            self._records.append(lines)
        except OSError as error:
            raise StorageError(
                f"cannot write --session {self.path}: {error.strerror}; make room, and run with that session again"
            ) from error

    @property
    def seal(self) -> LineSeal | None:
        """What encrypts the file, once there is a turn; None where nothing does."""
        return self._records.seal

    def close(self) -> None:
        """Let other runs have the file, which is not left behind empty."""
        self._records.close()

    def keep(self) -> None:
        """The file stays, though nothing was written to it here: something else is there by now."""
        self._records.lines.keep()


def save(given: str, transcript: Transcript, header: Mapping[str, Any]) -> None:
    """Write a session of these turns to a file, beside and renamed; one that is there is replaced only if it is a session.

    `header` is what the first line holds, but for the version. Of an encrypted session it is encrypted, with the same
    passphrase. Raises InputError for a file that is something else, or is in use, and StorageError.
    """
    passphrase = seal = None
    if isinstance(transcript, Session) and (passphrase := transcript.passphrase) is not None:
        seal = LineSeal(passphrase) if transcript.seal is None else transcript.seal.again()
    with contextlib.closing(Session(given, "/save", passphrase)) as there:
        lines = _line({"tpimpi session": CHANGED_VERSION, **header})
        if transcript.system is not None:
            lines += _line({"system": transcript.system})
        for turn in transcript.turns:
            lines += _turn_lines(turn) + b"".join(map(_token_line, turn.tokens))
            if turn.ended is not None:
                lines += _end_line(turn.ended, turn.text, turn.reasoning or None)
        if seal is not None:
            lines = seal.first_line + sealed(seal, lines)
        with replacing(there.path, "/save", private=True) as file:
            file.write(lines)
        there.keep()  # what is there now is not the empty file that was made


def _turn_lines(turn: Turn) -> bytes:
    return _line({"prompt": turn.prompt, "ids": turn.ids, "seed": turn.seed})


def _token_line(token: int) -> bytes:
    return b'{"token": %d}\n' % token


def _end_line(why: str, text: str, reasoning: str | None) -> bytes:
    return _line({"end": why, "text": text, **({} if reasoning is None else {"reasoning": reasoning})})


def _line(values: Mapping[str, Any]) -> bytes:
    # A model's name that is no UTF-8 keeps its bytes, as \udcXX.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _require(value: Mapping[str, Any], types: Mapping[str, type | None]) -> None:
    """Raise ValueError unless `value` has just these keys, with values of these types (None: any)."""
    if not isinstance(value, dict) or set(value) != set(types):
        raise ValueError(value)
    for key, kind in types.items():
        if kind is not None and type(value[key]) is not kind:
            raise ValueError(value[key])
