"""`python -m tests.mutation --module probelog/ranking`, `... --sample 50 --seed 1`: see docs/development.md."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter

from tests.mutation.run import BOUND, Mutant, Verdict, judge, modules, sample, sites, temporary_copy
from tests.support.paths import CHECKOUT

TABLE = CHECKOUT / "docs" / "benchmark" / "mutation.csv"
COLUMNS = ("module", "mutants", "tried", "killed", "accepted", "survived", "score", "seed")


def main() -> int:
    """Try mutants, print survivors and the table; 1 when too many survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "--module", action="append", help="a module or a folder of config.toml (default: all)"
    )
    parser.add_argument("--sample", type=int, help="so many mutants of each module by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample")
    parser.add_argument(
        "--line", type=int, nargs=2, metavar=("FIRST", "LAST"), help="only mutants of these lines"
    )
    parser.add_argument(
        "--no-table", action="store_true", help=f"leave {TABLE.relative_to(CHECKOUT)} as it is"
    )
    options = parser.parse_args()
    asked = [name.removeprefix("./").rstrip("/") for name in options.module or [""]]
    chosen = [
        name
        for name in modules()
        if any(name == some or name.startswith(some and f"{some}/") for some in asked)
    ]
    if not chosen:
        parser.error(f"no module of config.toml is called {', '.join(asked)}")
    rows = []
    with temporary_copy() as root:
        for name in chosen:
            picked = sample(sites(name), options.sample, options.seed)
            if options.line:
                picked = [site for site in picked if options.line[0] <= site.line <= options.line[1]]
            counts: Counter[Verdict] = Counter()
            for mutant, verdict in judge(picked, root):
                counts[verdict] += 1
                _report(mutant, verdict)
            rows.append(_row(name, counts, options.sample, options.seed))
            print(*rows[-1], sep=",", flush=True)
            if not options.no_table and not options.line:
                _write(rows[-1])
    return int(any(float(row[COLUMNS.index("score")]) < BOUND for row in rows))


def _report(mutant: Mutant, verdict: Verdict) -> None:
    if verdict == "survived":
        print(f"survived: {mutant}", flush=True)


def _row(module: str, counts: Counter[Verdict], sampled: int | None, seed: int) -> tuple[str, ...]:
    killed = counts["killed"] + counts["timed out"]
    tried, judged = sum(counts.values()), killed + counts["survived"]
    numbers = (len(sites(module)), tried, killed, counts["accepted"], counts["survived"])
    score = f"{killed / judged if judged else 1.0:.3f}"
    return (module, *map(str, numbers), score, "" if sampled is None else str(seed))


def _write(row: tuple[str, ...]) -> None:
    """Replace the row of a module that was judged now."""
    table = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            table = {known[0]: tuple(known) for known in list(csv.reader(file))[1:]}
    table[row[0]] = row
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *(table[name] for name in sorted(table))])


if __name__ == "__main__":
    sys.exit(main())
