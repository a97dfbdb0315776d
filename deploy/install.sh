#!/usr/bin/env sh
# Installs ProbeLog with everything that builds an index, or serves its page, into the Python environment that is active.
#   deploy/install.sh cpu     torch without CUDA's libraries (3 GB less), once deploy/torch-cpu.txt has its hashes
#   deploy/install.sh cuda    torch as PyPI has it for Linux, with them
#   deploy/install.sh web     the query client and the page alone
# The one place that says how: the image runs it, and so do virtual machines and the tests.
# Everything comes at the version and with the hash of requirements.txt: what builds this package, and uv where it is not
# there yet, too.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pinned=requirements.txt
extra=index
case "${1:-}" in
  cpu)
    # PyTorch's own index holds other builds of the same versions, and tells no upload dates: no hash of requirements.txt
    # and no date that fixes the resolution can hold for them. Their hashes are in a list of their own.
    if grep -q '^torch' deploy/torch-cpu.txt; then
      pinned=$work/requirements.txt
      awk '/^[^ ]/ { torch = /^torch(vision)?==/ } ! torch' requirements.txt | cat - deploy/torch-cpu.txt > "$pinned"
      set -- --torch-backend=cpu --exclude-newer-package torch=false --exclude-newer-package torchvision=false
    else
      echo "note: deploy/torch-cpu.txt has no hashes, so PyPI's builds of torch are installed, whose hashes are known; they" >&2
      echo "run on CPUs, too, and are 3 GB larger. For the smaller ones, once: bash .ci/torch-cpu.sh > deploy/torch-cpu.txt" >&2
      set --
    fi
    ;;
  cuda) set -- ;;
  web) set -- ; extra=web ;;
  *) echo "usage: deploy/install.sh cpu|cuda|web" >&2; exit 2 ;;
esac
if ! command -v uv > /dev/null; then
  awk '/^[^ ]/ { uv = /^uv==/ } uv' requirements.txt > "$work/uv.txt"
  python -m pip install --quiet --no-deps --require-hashes --requirement "$work/uv.txt"
fi
listed() { uv pip freeze --exclude-editable --exclude pip | sed 's/+cpu$//' | sort; }
listed > "$work/before"
# What the list pins is installed at that version and with that hash, and of the list only what the extra needs.
# Editable: `cluster` and `pipelines` are read from the checkout, they are in no wheel.
uv pip install "$@" --constraint "$pinned" --build-constraint "$pinned" --editable ".[$extra]"
# And nothing else was installed.
listed | comm -13 "$work/before" - > "$work/installed"
sed -n 's/^\([^ ;]*==[^ ;]*\).*/\1/p' "$pinned" | sed 's/+cpu$//' | sort > "$work/allowed"
unpinned=$(comm -23 "$work/installed" "$work/allowed")
if [ -n "$unpinned" ]; then
  echo "not in requirements.txt, so installed without a check: $unpinned" >&2
  echo "requirements.txt is out of date: uv run poe requirements" >&2
  exit 1
fi
