#!/usr/bin/env bash
# Prints the hashes of torch's and torchvision's builds for CPUs, at the versions of requirements.txt. They come from
# PyTorch's own index, which must be reachable.
#   bash .ci/torch-cpu.sh > deploy/torch-cpu.txt            after a change of these versions; deploy/install.sh checks them
set -euo pipefail
cd "$(dirname "$0")/.."
echo "# Hashes of torch's builds for CPUs, from PyTorch's own index, written by \`bash .ci/torch-cpu.sh > deploy/torch-cpu.txt\`."
grep -oE '^torch(vision)?==[^ ;]+' requirements.txt \
  | uv pip compile --quiet --no-config --no-deps --no-header --no-annotate --generate-hashes --torch-backend=cpu \
      --python-platform linux --python-version "${1:-3.12}" -
