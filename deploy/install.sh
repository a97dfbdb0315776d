#!/usr/bin/env sh
# Installs ProbeLog with everything that builds an index into the Python environment that is active.
#   deploy/install.sh cpu     torch without CUDA's libraries (3 GB less)
#   deploy/install.sh cuda    torch as PyPI has it for Linux, with them
# The one place that says how: the image runs it, and so do virtual machines and the tests.
set -eu
cd "$(dirname "$0")/.."
pinned=requirements.txt
case "${1:-}" in
  cpu)
    # PyTorch's own index holds other builds of the same versions, and tells no upload dates: no hash of the list and
    # no date that fixes the resolution can hold for its packages.
    pinned=$(mktemp)
    trap 'rm -f "$pinned"' EXIT
    awk '/^[^ ]/ { torch = /^torch(vision)?==/ } torch { if (/--hash/) next; sub(/ \\$/, "") } { print }' \
      requirements.txt > "$pinned"
    set -- --torch-backend=cpu --exclude-newer-package torch=false --exclude-newer-package torchvision=false
    ;;
  cuda) set -- ;;
  *) echo "usage: deploy/install.sh cpu|cuda" >&2; exit 2 ;;
esac
# What the list pins is installed at that version and with that hash, and of the list only what building an index needs.
# Editable: `cluster` and `pipelines` are read from the checkout, they are in no wheel.
uv pip install "$@" --constraint "$pinned" --editable ".[index]"
