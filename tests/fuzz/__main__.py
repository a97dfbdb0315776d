"""`python -m tests.fuzz --minutes 30`, `python -m tests.fuzz safetensors processors`: see docs/development.md."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import time
import traceback
import warnings

from tests.fuzz import targets  # noqa: F401 - registers them
from tests.fuzz.harness import TARGETS, fuzz

_ROUND = 500
#: Seconds of a round after which an input counts as one that never comes to an end.
_HANGS = 1800.0


def main() -> int:
    """Try inputs until the time is up; 1 where one failed, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each round takes the next")
    options = parser.parse_args()
    if unknown := set(options.target) - TARGETS.keys():
        parser.error(f"no target is called {', '.join(sorted(unknown))}")
    logging.disable()
    warnings.simplefilter("ignore")
    failed = False
    for name in options.target or TARGETS:
        until, number = time.monotonic() + 60 * options.minutes, options.seed
        try:
            while time.monotonic() < until:
                faulthandler.dump_traceback_later(_HANGS, exit=True)
                fuzz(TARGETS[name], _ROUND, number)
                number += 1
            print(f"{name}: {(number - options.seed) * _ROUND:,} inputs, nothing found", flush=True)
        except Exception:
            failed = True
            print(f"{name}: found with --seed {number}", flush=True)
            traceback.print_exc()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
