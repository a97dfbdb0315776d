"""Ask an index which models recognise something, and what else they recognise.

    python examples/ask_an_index.py s3://bucket/store "dog"

Needs the query client alone: no torch, no Ray.
"""

from __future__ import annotations

import sys

import probelog


def main(address: str, concept: str) -> None:
    """Print the five best logits, and the concepts that the best one's model stands for."""
    index = probelog.open_index(address)
    results = index.search(concept, k=5)
    for note in results.notes:
        print("note:", note)
    for hit in results:
        confidence = "" if hit.confidence is None else f" {hit.confidence:4.0%}"
        print(f"{hit.rank}. {hit.repo}#{hit.logit}{confidence}, declared as {hit.label!r}")
    if results:
        best = index.show(results[0].repo, concepts=3)
        print(f"\n{best.repo} ({best.library} {best.architecture}):")
        for logit in best.logits:
            print(f"  #{logit.logit} {'not ' if logit.negated else ''}{', '.join(logit.concepts)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
