"""Prompts in a file (--batch-file), a JSON object a line, and their answers in another (--out), in the same order.

A line of prompts is one of

    {"custom_id": "a", "prompt": "TEXT"}
    {"custom_id": "b", "messages": [{"role": "system", "content": "TEXT"}, {"role": "user", "content": "TEXT"}]}

with "max_tokens", "temperature", "top_p", "seed" and "stop" (a text or a list) where they differ from the run's options; or
a line of OpenAI's batch API, whose "body" holds these. A line of answers is one of

    {"custom_id": "a", "text": "TEXT", "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 40}
    {"custom_id": "b", "error": "TEXT"}

with "reasoning" where the answer has one. While a run works, answers are kept as they come in OUT.part, behind a line that
says of what prompts, model and options they are. A run that was ended goes on there: no prompt is answered twice. At the end
OUT has all answers, in the order of the prompts, and OUT.part goes. As OUT says of none of that, one that is there is never
taken for the answers.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import xxhash

from tpimpi.errors import InputError, StorageError, shorten, shorten_path
from tpimpi.serving.report import Answer
from tpimpi.system.files import replacing
from tpimpi.system.given_file import read_bytes
from tpimpi.system.line_file import LineFile

FORMAT_VERSION = 1
MAX_BATCH_FILE_BYTES = 1 << 30
PART = ".part"
_FIRST_KEY = "tpimpi batch"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked, and how it is to be answered; None: as the run's options say."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class _Line(Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of the file."""

    custom_id: str
    method: str | None = None
    url: str | None = None
    body: Body | None = None


class Item(msgspec.Struct, frozen=True):
    """One prompt of the file."""

    custom_id: str
    body: Body

    @property
    def max_tokens(self) -> int | None:
        body = self.body
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens

    @property
    def stops(self) -> list[str] | None:
        return [self.body.stop] if isinstance(self.body.stop, str) else self.body.stop

    def messages(self, system: str | None) -> list[dict[str, str]]:
        """Those that the model gets, with the run's `system` prompt before them unless they have their own."""
        body = self.body
        if body.messages is None:
            found = [{"role": "user", "content": body.prompt or ""}]
        else:
            found = [{"role": message.role, "content": message.content} for message in body.messages]
        if system is not None and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": system})
        return found


def read_items(given: str) -> tuple[list[Item], str]:
    """The prompts of the file that --batch-file gives, and a hash of it. Raises InputError, naming the first wrong line."""
    path, content = Path(given), read_bytes("--batch-file", given, MAX_BATCH_FILE_BYTES)
    items: list[Item] = []
    lines: dict[str, int] = {}  # of each custom_id

    def wrong(number: int, what: str) -> InputError:
        return InputError(f"--batch-file {shorten_path(path)}, line {number}: {what}; mend that line")

    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _item(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            raise wrong(number, _reason(error)) from error
        if item.custom_id in lines:
            what = (
                f"custom_id {shorten(item.custom_id)!r} is that of line {lines[item.custom_id]} too, each needs its own"
            )
            raise wrong(number, what)
        lines[item.custom_id] = number
        items.append(item)
    if not items:
        raise InputError(
            f'--batch-file {shorten_path(path)} has no prompts; give lines such as {{"custom_id": "a", "prompt": "TEXT"}}'
        )
    return items, xxhash.xxh3_128_hexdigest(content)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are not UTF-8"
    if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
        return f"no JSON ({error})"
    return str(error)


def _item(line: bytes) -> Item:
    """The prompt of one line. Raises ValueError and msgspec's errors where it is none."""
    found = msgspec.json.decode(line, type=_Line, strict=True)
    own = [name for name in Body.__struct_fields__ if getattr(found, name) is not None]
    if found.body is not None and own:
        raise ValueError(f"{own[0]} beside body, where it belongs into it")
    body = found.body or Body(**{name: getattr(found, name) for name in Body.__struct_fields__})
    if (body.prompt is None) == (body.messages is None):
        raise ValueError(
            "prompt and messages are both there" if body.prompt is not None else "no prompt, and no messages"
        )
    if body.prompt is not None and not body.prompt.strip():
        raise ValueError("the prompt is empty")
    _check_messages(body.messages)
    for name, value, least in (
        ("max_tokens", body.max_tokens, 1),
        ("max_completion_tokens", body.max_completion_tokens, 1),
        ("seed", body.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, must be {least} or more")
    if body.stop == "" or (isinstance(body.stop, list) and "" in body.stop):
        raise ValueError("stop is empty, must be a text to stop before")
    return Item(found.custom_id, body)


def _check_messages(messages: Sequence[Message] | None) -> None:
    """System prompt, if there is one, then user and assistant in turn, the user last: what chat templates take."""
    if messages is None:
        return
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise ValueError(
            f"messages are of {', '.join(roles) or 'nobody'}; needed are user and assistant in turn, the user last, and "
            "before them system, if there is one"
        )
    if not messages[-1].content.strip():
        raise ValueError("the last message is empty")


class BatchAnswers:
    """The answers of a batch, on their way to OUT; see the module's docstring. One run at a time has them."""

    def __init__(self, given: str, items: Sequence[Item], about: Mapping[str, Any]) -> None:
        """`about` is what has to be the same when a run goes on: values of JSON, under their names for a message. Raises
        InputError where there are answers to something else."""
        self.path = Path(given)
        self._items = items
        self._places: dict[
            str, tuple[int, int]
        ] = {}  # of each line that is there: where it begins in the part, its length
        self._failed: set[str] = set()  # of those, lines that say why there is no answer
        self._about = dict(about)
        self._has_header = False
        self._model = ""
        there = self._check_out()
        try:
            self._part = LineFile(Path(given + PART), lambda what: InputError(f"{shorten_path(given + PART)}{what}"))
        except OSError as error:
            raise InputError(f"--out {shorten_path(self.path)}: {error.strerror}; choose another place") from error
        try:
            with self._part.reader() as file:
                self._part.whole = self._read(file)
            if there and (self.left or b"".join(self._lines()) != self.path.read_bytes()):
                raise InputError(
                    f"--out {shorten_path(self.path)} is there already; remove it, and the prompts are answered again, or "
                    "choose another name"
                )
        except BaseException:
            self.close()
            raise

    @property
    def left(self) -> list[Item]:
        """The prompts that have no answer yet; those that could not be answered before are tried again."""
        return [item for item in self._items if item.custom_id not in self._places]

    @property
    def failed(self) -> int:
        """Prompts that could not be answered."""
        return len(self._failed)

    def _check_out(self) -> bool:
        """Whether OUT is there, which a run may have left beside its part. Raises InputError where it is no file."""
        if not self.path.exists():
            return False
        if not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no file that can be kept"
            raise InputError(f"--out {shorten_path(self.path)} is {what}; give the name of a file")
        return self.path.stat().st_size > 0

    def _read(self, lines: Iterator[bytes]) -> int:
        """Take in what a run before left; returns how many bytes of it are whole lines."""
        part, known = shorten_path(str(self.path) + PART), {item.custom_id for item in self._items}
        whole = 0
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                if not number:
                    self._check_header(value, part)
                    self._has_header = True
                elif value["custom_id"] not in known:
                    raise ValueError(value)
                elif "error" not in value:
                    self._places[value["custom_id"]] = (whole, len(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{part} is broken in line {number + 1}; remove it, and all prompts are answered again"
                ) from error
            whole += len(line)
        return whole

    def _check_header(self, value: Mapping[str, Any], part: str) -> None:
        if value[_FIRST_KEY] != FORMAT_VERSION:
            raise InputError(
                f"{part} is of format version {value[_FIRST_KEY]}, this tpimpi knows {FORMAT_VERSION}; remove it"
            )
        for name, wanted in self._about.items():
            self._check_same(name, value[name], wanted)
        self._model = value["weights"]

    def _check_same(self, name: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise InputError(
                f"{shorten_path(str(self.path) + PART)} has answers of a run with other {name}; go on with those, or remove "
                "the file, and all prompts are answered again"
            )

    def use_model(self, fingerprint: str) -> None:
        """The answers are of this model. Raises InputError where a run before had another."""
        self._check_same("weights", self._model or fingerprint, fingerprint)
        self._model = fingerprint

    def add(self, custom_id: str, answer: Answer | str) -> None:
        """The answer to a prompt, or why it has none. Raises StorageError."""
        values: dict[str, Any] = {"custom_id": custom_id}
        if isinstance(answer, str):
            values["error"] = answer
            self._failed.add(custom_id)
        else:
            values |= (
                {"text": answer.text, "reasoning": answer.reasoning} if answer.reasoning else {"text": answer.text}
            )
            values["finish_reason"] = answer.finish_reason
            values |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.token_ids)}
        header = (
            b"" if self._has_header else _json_line({_FIRST_KEY: FORMAT_VERSION, **self._about, "weights": self._model})
        )
        line, place = _json_line(values), self._part.whole + len(header)
        try:
            self._part.append(header + line)
        except OSError as error:
            raise StorageError(
                f"cannot write {shorten_path(self._part.path)}: {error.strerror}; make room, and run again, which goes "
                "on there"
            ) from error
        self._has_header = True
        self._places[custom_id] = (place, len(line))

    def finish(self) -> None:
        """All prompts have an answer, or a reason: OUT has them. Raises StorageError."""
        assert not self.left
        with replacing(self.path, "--out", private=True) as file:
            file.writelines(self._lines())
        self._part.path.unlink(missing_ok=True)
        self._part.keep()
        self.close()

    def _lines(self) -> Iterator[bytes]:
        """Those of the part, in the order of the prompts."""
        with self._part.reader() as file:
            for item in self._items:
                place, length = self._places[item.custom_id]
                file.seek(place)
                yield file.read(length)

    def close(self) -> None:
        """Let other runs have the file."""
        self._part.close()


def _json_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
