"""What a run leaves on disks: whatever holds text, ids or keys is for its owner alone, whatever the umask."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.launch import run_command
from tpimpi.system.link_keys import read_keys

PROMPT = "the quick brown fox jumps over the lazy dog"
PASSPHRASE = "correct horse battery staple"


def test_files_with_text_or_keys_are_their_owners_alone(cache: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    given, written = tmp_path / "given", tmp_path / "written"
    given.mkdir()
    written.mkdir()
    (given / "prompt").write_text(PROMPT)
    (given / "key").write_text(PASSPHRASE)
    (given / "key").chmod(0o600)
    lines = [{"custom_id": "a", "prompt": PROMPT}, {"custom_id": "b", "prompt": f"{PROMPT}?"}]
    (given / "prompts").write_text("\n".join(map(json.dumps, lines)))
    env = {**cache, "TPIMPI_LINK_KEYS": str(written / "link-keys")}

    def run(*arguments: str) -> None:
        done = run_command(
            ["sh", "-c", 'umask 0; exec "$@"', "sh", sys.executable, "-m", "tpimpi", *arguments],
            env=env,
            cwd=written,
        )
        assert done.code == 0, done.err

    model = ("--model", str(tiny), "--format", "f32")
    answer = (*model, "--max-tokens", "5", "--quiet")
    prompt = (*answer, "--prompt-file", str(given / "prompt"))
    run(*prompt, "--session", "session", "--keep-cache", "kept", "--report", "report", "--trace", "trace")
    (written / "copy").write_bytes((written / "session").read_bytes())
    (written / "copy").chmod(0o644)  # as a copy is
    run(*prompt, "--session", "copy", "--plot", "plot.png")
    run(*prompt, "--session", "sealed", "--session-key-file", str(given / "key"), "--keep-cache", "kept")
    run(*answer, "--batch-file", str(given / "prompts"), "--out", "answers", "--report", "batch-report")
    run("perplexity", str(given / "prompt"), *model, "--report", "perplexity", "--quiet")
    run("doctor", "--make-keys")

    keys = read_keys(written / "link-keys")
    assert keys is not None
    secrets = [PROMPT.encode(), PASSPHRASE.encode(), keys.private.encode(), bytes.fromhex(keys.private)]
    entry = json.loads((written / "session.cache").read_text())
    secrets.append(entry["key"].encode())
    for_others, with_secrets, names = set(), set(), set()
    for path in written.rglob("*"):
        name = path.name if not path.name.endswith(".kv") else "pages"
        if path.is_dir():
            assert path.stat().st_mode & 0o077 == 0, path
            continue
        names.add(name)
        data = path.read_bytes()
        if any(secret in data for secret in secrets):
            with_secrets.add(name)
        if path.stat().st_mode & 0o077:
            for_others.add(name)
    assert names == {
        *("session", "session.cache", "copy", "sealed", "sealed.cache", "pages", "report", "trace", "plot.png"),
        *("answers", "batch-report", "perplexity", "link-keys"),
    }
    assert for_others == {"plot.png"}, "which has no text"
    assert with_secrets == {"session", "session.cache", "copy", "link-keys"}, "the search sees too little, or too much"
