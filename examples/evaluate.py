"""Measure how well an index answers, against a file that says what every logit stands for.

    python examples/evaluate.py s3://bucket/store truth.json

docs/results.md describes the truth file and the full benchmark (`probelog-index evaluate --out`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.evaluate import evaluate


def main(address: str, truth_file: str) -> None:
    """Print accuracy of this index and of the methods to compare it with, and the first place by chance."""
    evaluation = evaluate(address, Path(truth_file))
    print("\n".join(evaluation.lines()))
    best = max(evaluation.methods, key=lambda method: method.every.average_precision)
    print(f"highest mean average precision: {best.name}, {best.every.average_precision:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
