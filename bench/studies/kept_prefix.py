"""What is kept of a prompt: a second question on a long text, and a conversation of many turns; times, and rows computed.

    python -m bench.studies.kept_prefix                                       # SmolLM2
    python -m bench.studies.kept_prefix --model "$(bash jobs/gemma.sh)" --raw

The text is that of docs/guide.md, cut to a size; both questions are lines of standard input, each for itself. Of the
conversation each turn's `cached_tokens` and `rows_computed` are printed beside how many positions the turn before left: what
is computed is what is new in the prompt, and the answer but for its last token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("What does this text explain?", "Which option bounds the memory of a rank?")
TURNS = (
    *(
        "Name a colour.",
        "Name a fruit of that colour.",
        "Where does it grow?",
        "Name another such place.",
        "Is it warm there?",
    ),
    *(
        "Who lives there?",
        "What do they eat?",
        "How is it made?",
        "Write a line of verse about it.",
        "Thank you. Say goodbye.",
    ),
)


def answers(lines: list[str], options: argparse.Namespace, *more: str) -> list[dict[str, Any]]:
    """The answers of a run to these lines, as its report has them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable,
            "-m",
            "tpimpi",
            "--quiet",
            *("--speculate", "off"),
            "--report",
            str(report),
            "--max-tokens",
            str(options.tokens),
        ]
        command += ["--model", options.model] if options.model else []
        command += ["--raw"] if options.raw else []
        command += [option.replace("FOLDER", folder) for option in more]
        subprocess.run(
            command, input="".join(f"{line}\n" for line in lines), text=True, check=True, stdout=subprocess.DEVNULL
        )
        found: list[dict[str, Any]] = json.loads(report.read_text())["answers"]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2")
    parser.add_argument(
        "--characters", type=int, default=16_000, help="of the text (default 16,000, about 4,000 tokens)"
    )
    parser.add_argument("--tokens", type=int, default=24, help="of an answer at most (default 24)")
    parser.add_argument("--raw", action="store_true", help="the model has no chat template")
    options = parser.parse_args()
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    text = " ".join((ROOT / "docs/guide.md").read_text().split())[: options.characters]
    first, second = answers([f"{text} {question}" for question in QUESTIONS], options)
    for name, found in (("first question", first), ("second question", second)):
        print(
            f"{name}: {found['prompt_tokens']} tokens, {found['cached_tokens']} kept, first token {found['ttft_s']:.3f} s"
        )
    print(f"the second question's first token comes {first['ttft_s'] / second['ttft_s']:.1f} times sooner")
    there = 0  # positions that the turn before left: its last token is not computed
    for number, found in enumerate(answers(list(TURNS), options, "--session", "FOLDER/session.jsonl"), 1):
        made = len(found["token_ids"])
        print(
            f"turn {number}: prompt {found['prompt_tokens']}, there {there}, kept {found['cached_tokens']}, "
            f"computed {found['rows_computed']}, answer {made}, first token {found['ttft_s']:.3f} s"
        )
        there = found["prompt_tokens"] + made - 1


if __name__ == "__main__":
    main()
