#!/usr/bin/env sh
# Installs ProbeLog with everything that builds an index into the Python environment that is active.
#   deploy/install.sh cpu     torch without CUDA's libraries (3 GB less)
#   deploy/install.sh cuda    torch as PyPI has it for Linux, with them
# The one place that says how: the image runs it, and so do virtual machines and the tests.
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
  # PyTorch's own index tells no upload dates, so the date that fixes the resolution cannot hold for its packages.
  cpu) set -- --torch-backend=cpu --exclude-newer-package torch=false --exclude-newer-package torchvision=false ;;
  cuda) set -- ;;
  *) echo "usage: deploy/install.sh cpu|cuda" >&2; exit 2 ;;
esac
# Editable: `cluster` and `pipelines` are read from the checkout, they are in no wheel.
uv pip install "$@" --editable ".[index]"
