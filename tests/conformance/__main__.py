"""Compare every architecture with its own library and write the table of docs/conformance.md.

    python -m tests.conformance [--all [--hashed]] [--built] [--resume] [--library timm] [--csv FILE] [--page FILE] [ARCHITECTURE ...]

A new release of a library is tried without changing anything else:

    uv run --with timm==1.0.32 --with transformers==5.24.0 python -m tests.conformance --all --csv new.csv --page ""
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import transformers

from tests.conformance import construction, timm_models, transformers_models
from tests.conformance.compare import Outcome
from tests.conformance.table import markdown, read_csv, write_csv

ROOT = Path(__file__).parents[2]
CSV = ROOT / "docs" / "benchmark" / "conformance.csv"
PAGE = ROOT / "docs" / "conformance.md"
BEGIN = "<!-- The rest of this page is written by `python -m tests.conformance`; do not edit it. -->\n"


def architectures(
    library: str | None, everything: bool, named: list[str], hashed: bool = False
) -> Iterator[tuple[str, str]]:
    """Library and architecture of what is to be compared."""
    known = [name for name in transformers_models.classes() if name != transformers_models.WRAPPER]
    for name in known:
        if library in (None, "transformers") and (not named or name in named):
            yield "transformers", name
    names = timm.list_models() if everything or named else timm_models.ONE_OF_EACH
    for name in sorted(names, key=_hash) if hashed else names:
        if library in (None, "timm") and (not named or name in named):
            yield "timm", name


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def outcomes(library: str, architecture: str, built: bool = False) -> Iterator[Outcome]:
    """One architecture in all layouts; what its own library cannot do is an outcome too."""
    folder = Path(tempfile.mkdtemp())
    module = transformers_models if library == "transformers" else timm_models
    try:
        if built:
            yield from construction.outcomes(architecture, folder)
            return
        if library == "timm" and timm_models.parameters(architecture) > timm_models.MOST_PARAMETERS:
            return
        yield from module.outcomes(architecture, folder)
    except Exception as error:  # reason: libraries raise anything on architectures of their own
        said = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        yield Outcome(library, architecture, "all", f"the library fails ({said})".replace("|", "/"))
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run it; exit status 1 where anything is different."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("architecture", nargs="*", help="only these")
    parser.add_argument(
        "--all", action="store_true", help="every architecture of timm below 40 million parameters"
    )
    parser.add_argument(
        "--hashed",
        action="store_true",
        help="timm's in the order of a hash of their names: a run that is ended has tried a random part",
    )
    parser.add_argument(
        "--built",
        action="store_true",
        help="create timm's from their configuration, of any size, and compare modules and pixels; run none",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the outcomes of an earlier run: architectures that it has are not tried again",
    )
    parser.add_argument("--library", choices=["transformers", "timm"])
    parser.add_argument("--csv", type=Path, default=CSV, help="where the outcomes go")
    parser.add_argument("--page", default=str(PAGE), help="page whose table is written anew; empty: none")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads()))
    if options.built:
        options.library = "timm"
    earlier = read_csv(options.csv) if options.resume and options.csv.exists() else []
    known = {(outcome.library, outcome.architecture) for outcome in earlier}
    named = architectures(options.library, options.all, options.architecture, options.hashed)
    jobs = [job for job in named if job not in known]

    def run() -> Iterator[list[Outcome]]:
        yield earlier
        for number, (library, architecture) in enumerate(jobs, 1):
            found = list(outcomes(library, architecture, options.built))
            for outcome in found:
                print(
                    f"{number}/{len(jobs)} {architecture}, {outcome.layout}: {outcome.result}",
                    file=sys.stderr,
                )
            yield found

    write_csv(run(), options.csv)
    table = markdown(read_csv(options.csv))
    print(table)
    if options.page:
        page = Path(options.page)
        page.write_text(page.read_text().partition(BEGIN)[0] + BEGIN + "\n" + table)
    return int(any(not outcome.good for outcome in read_csv(options.csv)))


if __name__ == "__main__":
    raise SystemExit(main())
