#!/usr/bin/env bash
# Prints the pinned, hashed list of what pyproject.toml asks for: every extra and group, no address of any host.
#   bash .ci/requirements.sh > new && mv new requirements.txt     after a change of pyproject.toml (uv run poe requirements)
#   bash .ci/requirements.sh | diff requirements.txt -            the check (uv run poe requirements-check)
set -euo pipefail
cd "$(dirname "$0")/.."
# Resolved anew, as of `exclude-newer` in pyproject.toml: an old lock file would keep what it holds.
rm -f uv.lock
trap 'rm -f uv.lock' EXIT
# By the uv of the list itself: another one may write the same list in other words.
uv=(uv)
pinned=$(sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements.txt)
[[ -n "$pinned" ]] || { echo "requirements.txt names no uv: write to another file, then move it there" >&2; exit 1; }
[[ "$(uv --version)" == "uv $pinned "* ]] || uv=(uv tool run --quiet "uv@$pinned")
echo "# Written by \`uv run poe requirements\` from pyproject.toml. The image and .ci/run install from it."
"${uv[@]}" export --quiet --format requirements.txt --all-extras --all-groups --no-emit-project --no-header --no-annotate
