#!/usr/bin/env bash
# Looks for known weaknesses of the packages in requirements/run.txt (pip-audit, which asks PyPI). Where that cannot be reached it
# says so in a line that begins "advisories: not looked up", and succeeds.
set -euo pipefail
cd "$(dirname "$0")/.."

tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
not_run() {
  echo "advisories: not looked up: $*" >&2
  exit 0
}
{ python3 -m venv "$tools" && "$tools/bin/pip" install --quiet --disable-pip-version-check pip-audit; } >"$tools/log" 2>&1 ||
  not_run "pip-audit cannot be installed ($(tail -n 1 "$tools/log"))"
code=0
timeout 300 "$tools/bin/pip-audit" --disable-pip --require-hashes --requirement requirements/run.txt --format json --timeout 15 \
  --progress-spinner off >"$tools/found.json" 2>"$tools/log" || code=$?
# It ends with 1 for what it finds, and for what it could not ask.
"$tools/bin/python" - "$tools/found.json" <<'END' || not_run "the advisories cannot be reached ($(tail -n 1 "$tools/log"))"
import json, sys
with open(sys.argv[1]) as file:
    found = json.load(file)["dependencies"]
assert found
weak = [one for one in found if one.get("vulns")]
for one in weak:
    for vulnerability in one["vulns"]:
        newer = ", ".join(vulnerability["fix_versions"]) or "none yet"
        print(f"advisories: {one['name']} {one['version']}: {vulnerability['id']}, mended in: {newer}", file=sys.stderr)
print(f"advisories: {len(found)} packages looked up, {len(weak)} with known weaknesses", file=sys.stderr)
END
exit "$code"
