#!/usr/bin/env bash
# Prints the pinned, hashed list of what pyproject.toml asks for: every extra and group, no address of any host.
#   bash .ci/requirements.sh > requirements.txt             after a change of pyproject.toml (uv run poe requirements)
#   bash .ci/requirements.sh | diff requirements.txt -      the check (uv run poe requirements-check)
set -euo pipefail
cd "$(dirname "$0")/.."
# Resolved anew, as of `exclude-newer` in pyproject.toml: an old lock file would keep what it holds.
rm -f uv.lock
trap 'rm -f uv.lock' EXIT
echo "# Written by \`uv run poe requirements\` from pyproject.toml. The image and .ci/run install from it."
uv export --quiet --format requirements.txt --all-extras --all-groups --no-emit-project --no-header --no-annotate
