"""What speculation gives: ten prompts that quote and edit, and three that do not, with and without it in turn.

    python -m bench.studies.speculation [--model PATH] [--ranks 1] [--speculate auto] [--rounds 3] [--options "--window 2"]

For each prompt: tokens of the answer, passes, tokens a pass, drafted and accepted tokens, and seconds a token with and
without, medians of the rounds. Answers must be the same, and those of quoting prompts must not loop: they end before the
limit, and no run of 8 ids is in one twice, unless it is as often in the user's text. The prompts are in
quoting_prompts.json; with `--options=--raw`, for a base model, in few_shot_prompts.json, each with two worked examples,
and the end of the line ends the answer.

    python -m bench.studies.speculation --suffixes TEXT… [--model PATH]

How often what followed the longest suffix of a text that was there before is right, by how long that was, in tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.experiments.site import ROOT
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.weights.locations import model_path
from tpimpi.weights.sources import open_source

PROMPTS = Path(__file__).with_name("quoting_prompts.json")
FEW_SHOT_PROMPTS = Path(__file__).with_name("few_shot_prompts.json")
FREE = (
    "Why is the sky blue?",
    "Tell me a short story about a fox that wants to see the sea.",
    "What should I think of before I buy a used bicycle?",
)
MAX_TOKENS = 220
LONGEST_SUFFIX = 16  # tokens, that are told apart
LOOP = 8  # tokens of a run that an answer without loops has once


@dataclass(frozen=True)
class Prompt:
    """A prompt that quotes or edits `text`, the user's; `stop` ends the answer, where there is one."""

    task: str
    prompt: str
    text: str
    stop: str | None = None


def quoting_prompts(*, raw: bool) -> list[Prompt]:
    """The ten of models that follow instructions, or `raw` of those that complete a text."""
    if not raw:
        asked = json.loads(PROMPTS.read_text(encoding="utf-8"))
        return [Prompt(each["task"], each["prompt"], each["prompt"]) for each in asked]
    shown = json.loads(FEW_SHOT_PROMPTS.read_text(encoding="utf-8"))
    return [
        Prompt(
            each["task"],
            f"{shown['examples'][each['examples']]}Text: {each['text']}\n{each['answer']}",
            each["text"],
            shown["stop"],
        )
        for each in shown["prompts"]
    ]


def loops(ids: Sequence[int], text: Sequence[int]) -> bool:
    """Whether a run of LOOP ids is twice in an answer, and more often than in the text that it quotes."""
    said, given = (
        Counter(tuple(of[start : start + LOOP]) for start in range(len(of) - LOOP + 1)) for of in (ids, text)
    )
    return any(count > max(1, given[run]) for run, count in said.items())


class Runs:
    """Runs of tpimpi on one prompt."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder

    def run(self, prompt: str, speculate: str, stop: str | None) -> dict[str, Any]:
        """The report."""
        text, report = self.folder / "prompt.txt", self.folder / "report.json"
        text.write_text(prompt, encoding="utf-8")
        command = [sys.executable, "-m", "tpimpi", "--prompt-file", str(text), "--report", str(report), "--quiet"]
        command += ["--max-tokens", str(MAX_TOKENS), "--speculate", speculate, *self.options.options.split()]
        command += ["--model", self.options.model] if self.options.model else []
        command += [] if stop is None else ["--stop", stop]
        if self.options.ranks > 1:
            mpirun = shutil.which("mpirun")
            assert mpirun, "no mpirun: source .venv/bin/activate"
            command = [
                mpirun,
                "-np",
                str(self.options.ranks),
                "--hostfile",
                str(ROOT / "hostfiles/local.txt"),
                *command,
            ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def pairs(self, prompt: str, stop: str | None = None) -> dict[str, Any]:
        """With and without in turn: the last report with speculation, and medians of seconds a token."""
        with_it, without = [], []
        for _ in range(self.options.rounds):
            without.append(self.run(prompt, "off", stop))
            with_it.append(self.run(prompt, self.options.speculate, stop))
        same = all(report["token_ids"] == without[0]["token_ids"] for report in with_it)
        seconds = [median(report["s_per_token_mean"] for report in reports) for reports in (with_it, without)]
        return {**with_it[-1], "same": same, "seconds": seconds}


def measure(options: argparse.Namespace) -> None:
    """Print a line for each prompt."""
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    tokenizer = tokenizer_of(options.model)
    quoting = quoting_prompts(raw="--raw" in options.options.split())
    print(f"{'':22} tokens  passes  a pass  drafted  accepted  s/token  without  times faster")
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(options, Path(folder))
        answers = []
        for each in quoting:
            answer = runs.pairs(each.prompt, each.stop)
            answer["loops"] = loops(answer["token_ids"], tokenizer.encode(each.text, special=False))
            answers.append(show(each.task, answer))
        summarize("quoting", answers)
        clean = sum(answer["finish_reason"] == "stop" and not answer["loops"] for answer in answers)
        same = sum(answer["same"] for answer in answers)
        mean = fmean(answer["tokens_per_pass"] for answer in answers)
        print(
            f"{clean} of {len(answers)} ended by themselves and do not loop; {same} have the ids of a run without "
            f"speculation; mean of their tokens a pass: {mean:.2f}\n"
        )
        summarize("free text", [show(text[:22], runs.pairs(text)) for text in FREE])


def tokenizer_of(model: str | None) -> Tokenizer | TokenIds:
    with open_source(model_path(model)) as source:
        return load_tokenizer(source.tokenizer_assets(), source.config.vocab)


def summarize(name: str, answers: Sequence[dict[str, Any]]) -> None:
    """Print what the answers took together."""
    tokens, passes = (sum(answer[what] for answer in answers) for what in ("tokens", "passes"))
    faster = median(answer["seconds"][1] / answer["seconds"][0] for answer in answers)
    print(f"{name}: {tokens / passes:.2f} tokens a pass; {faster:.2f} times as fast (median)")


def show(task: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Print the line of an answer."""
    answer["tokens"] = round(answer["tokens_per_pass"] * answer["passes"])  # with the one that ends it
    with_it, without = answer["seconds"]
    figures = [answer[name] for name in ("tokens", "passes", "tokens_per_pass", "drafted_tokens", "accepted_tokens")]
    print(
        "{:22} {:6}  {:6}  {:6.2f}  {:7}  {:8}".format(task, *figures),
        f" {with_it:7.4f}  {without:7.4f}  {without / with_it:6.2f}",
        ("" if answer["same"] else "  OTHER TOKENS")
        + ("  cut" if answer["finish_reason"] == "length" else "")
        + ("  LOOPS" if answer.get("loops") else ""),
        flush=True,
    )
    return answer


def suffixes(ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """By the length of the longest suffix of what is before a token that was there before: how many tokens have such a
    one, and of how many what followed it last is the token."""
    last: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_SUFFIX + 1)]
    count, right = Counter[int](), Counter[int]()
    for end in range(1, len(ids)):
        grams = {n: tuple(ids[end - n : end]) for n in range(1, min(LONGEST_SUFFIX, end) + 1)}
        longest = max((n for n, gram in grams.items() if gram in last[n]), default=0)
        if longest:
            count[longest] += 1
            right[longest] += ids[last[longest][grams[longest]]] == ids[end]
        for n, gram in grams.items():
            last[n][gram] = end
    return {n: (count[n], right[n]) for n in sorted(count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--speculate", default="auto", help="auto, or how many tokens to draft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="", help="more options of the runs")
    parser.add_argument("--suffixes", type=Path, nargs="+", metavar="TEXT", help="texts to count suffixes in")
    options = parser.parse_args()
    if not options.suffixes:
        measure(options)
        return
    tokenizer = tokenizer_of(options.model)
    for path in options.suffixes:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), special=False)
        print(f"{path}: {len(ids)} tokens\nsuffix  tokens  right")
        for n, (count, right) in suffixes(ids).items():
            print(f"{n:6}  {count:6}  {right / count:5.0%}")


if __name__ == "__main__":
    main()
