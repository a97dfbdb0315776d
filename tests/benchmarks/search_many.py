"""Many texts at once beside one by one: how many times faster `Index.search_many` is than a loop over `Index.search`.

    python -m tests.benchmarks.search_many [--index URI] [--texts N] [--logits N ...]

Without ``--index`` indexes of random logits are made (20,000 by default, below the size from which a shortlist is searched,
and 200), with a tiny text encoder; the texts are names of the background and made-up names.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import probelog
from probelog.storage.store import Store
from tests.support.worlds.small_index import BACKGROUND, Model, build

_LOGITS_PER_MODEL = 50
_ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", help="a published index; by default random ones are made")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--logits", type=int, nargs="+", default=[200, 20_000])
    given = parser.parse_args()
    print(f"{'logits':>10} {'texts':>6} {'ms one by one':>14} {'ms at once':>11} {'times faster':>13}")
    with tempfile.TemporaryDirectory(prefix="search-many-") as folder:
        uris = [given.index] if given.index else [made(Path(folder) / str(n), n) for n in given.logits]
        for uri in uris:
            with probelog.open_index(uri) as index:
                single, batch = measured(index, given.texts)
                print(
                    f"{index.logits:>10,} {given.texts:>6} {1000 * single:>14.2f} {1000 * batch:>11.2f} "
                    f"{single / batch:>13.1f}"
                )


def made(folder: Path, logits: int) -> str:
    """The address of an index of so many random logits."""
    labels = tuple(f"thing {i}" for i in range(_LOGITS_PER_MODEL))
    models = [Model(f"made/model-{i}", labels) for i in range(logits // _LOGITS_PER_MODEL)]
    return build(Store(folder), models=models, images=False, names=names(300), probes=1000).store.uri


def names(count: int) -> list[str]:
    return [*BACKGROUND, *(f"{a} {b}" for a in BACKGROUND for b in range(count))][:count]


def measured(index: probelog.Index, count: int) -> tuple[float, float]:
    """Seconds a text one by one and at once, medians of some rounds."""
    texts = names(count)
    index.search_many(texts[:2])  # starts the encoder, reads the logits
    singles, batches = [], []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for text in texts:
            index.search(text)
        middle = time.perf_counter()
        index.search_many(texts)
        ended = time.perf_counter()
        singles.append((middle - begun) / len(texts))
        batches.append((ended - middle) / len(texts))
    return statistics.median(singles), statistics.median(batches)


if __name__ == "__main__":
    main()
