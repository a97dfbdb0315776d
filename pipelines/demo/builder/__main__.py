"""``python -m pipelines.demo.builder --out DIR``: build the demo's world."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from pipelines.demo.builder.build import build
from probelog.errors import ProbeLogError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and build; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo.builder", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must be empty or absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a toy world in seconds, barely trained")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="models trained side by side"
    )
    parser.add_argument("--encoder-from", type=Path, help="take the encoder from a world made earlier")
    options = parser.parse_args(arguments)
    try:
        build(
            options.out,
            seed=options.seed,
            quick=options.quick,
            device=options.device,
            workers=options.workers,
            encoder_from=options.encoder_from,
            say=partial(print, flush=True),
        )
    except ProbeLogError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
