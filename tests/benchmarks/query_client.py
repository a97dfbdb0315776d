"""What the query client costs on a laptop: size on disk, import, first and second query.

    uv run python tests/benchmarks/query_client.py --index URI

Builds an environment with the base dependencies alone in a temporary folder, checks that neither torch nor Ray got
in, and asks the index from fresh processes there. Times are of this machine; the sizes are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "ray", "transformers", "timm", "boto3")

ASK = """
import json, sys, time
start = time.perf_counter()
import probelog
import probelog.client
imported = time.perf_counter()
index = probelog.open_index(sys.argv[1])
opened = time.perf_counter()
index.search(text=sys.argv[2])
first = time.perf_counter()
times = []
for _ in range(20):
    begun = time.perf_counter()
    index.search(text=sys.argv[2])
    times.append(time.perf_counter() - begun)
print(json.dumps({
    "import": imported - start, "open": opened - imported, "first": first - opened,
    "second": times[0], "median": sorted(times)[10],
    "models": index.models, "logits": index.logits,
    "heavy": [name for name in sys.argv[3].split() if name in sys.modules],
}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--index", required=True, help="a published index, or the store that holds one")
    parser.add_argument("--query", default="dog")
    given = parser.parse_args()
    address = given.index if "://" in given.index else str(Path(given.index).absolute())
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        plain = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
        subprocess.run(
            ["uv", "venv", "--quiet", "--python", sys.executable, str(environment)], check=True, env=plain
        )
        python = environment / "bin" / "python"
        install = ["uv", "pip", "install", "--quiet", "--python", str(python), str(ROOT)]
        subprocess.run(install, check=True, env=plain, cwd=folder)
        site = next(environment.glob("lib/python*/site-packages"))
        wrong = [name for name in FORBIDDEN if (site / name).exists()]
        if wrong:
            raise SystemExit(f"the base dependencies bring in {', '.join(wrong)}")
        sizes = sorted(((size_of(path), path.name) for path in site.iterdir()), reverse=True)
        # A fresh process each: the first also fills the disk cache, the second is what an analyst meets.
        runs = [
            json.loads(
                subprocess.run(
                    [str(python), "-c", ASK, address, given.query, " ".join(FORBIDDEN)],
                    check=True,
                    env=plain,
                    cwd=folder,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(2)
        ]
    total = sum(size for size, _ in sizes)
    print(
        f"site-packages: {total / 1e6:.0f} MB, of which "
        + ", ".join(f"{n} {s / 1e6:.0f}" for s, n in sizes[:5])
    )
    print(
        f"index: {runs[0]['models']} models, {runs[0]['logits']} logits; heavy modules loaded: {runs[0]['heavy']}"
    )
    print(f"{'process':<10}{'import':>10}{'open':>10}{'1st query':>12}{'2nd query':>12}{'median of 20':>14}")
    for name, run in zip(("cold", "warm"), runs, strict=True):
        print(
            f"{name:<10}{run['import']:9.2f}s{run['open']:9.2f}s{run['first']:11.2f}s"
            f"{1000 * run['second']:10.1f}ms{1000 * run['median']:12.1f}ms"
        )


def size_of(path: Path) -> int:
    """Bytes below a path."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
