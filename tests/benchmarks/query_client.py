"""What an analyst's machine pays for the query client: disk, imports, and the first queries.

    uv run python tests/benchmarks/query_client.py [--index URI] [--text WORD] [--runs N]

Makes a virtual environment with the project's base dependencies and nothing else, and asks an index from fresh
processes there. Without an index one of 1,000 random logits and 2,000 probes is made first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from multiprocessing import get_context
from pathlib import Path

from tests.support.paths import CHECKOUT

UNWANTED = ("torch", "torchvision", "ray", "transformers", "timm", "boto3", "onnx")

# One fresh process: each step as an analyst's notebook would meet it.
CHILD = """
import json, resource, sys, time
from importlib.util import find_spec
uri, text, *unwanted = sys.argv[1:]
times, start = {}, time.perf_counter()
def lap(name):
    global start
    times[name] = time.perf_counter() - start
    start = time.perf_counter()
import probelog
lap("import probelog")
import probelog.search.client
lap("import probelog.search.client")
import lancedb
lap("import lancedb")
index = probelog.open_index(uri)
lap("open_index")
hits = index.search(text)
lap("first query")
index.search(text)
lap("second query")
index.search(like=f"{hits[0].repo}#{hits[0].logit}")
lap("first query by logit")
index.show(hits[0].repo)
lap("show")
print(json.dumps({
    "times": times,
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "models": index.models,
    "logits": index.logits,
    "probes": index.settings.get("probes"),
    "present": [name for name in unwanted if find_spec(name) is not None],
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", help="a published index or its store; by default a random one is made")
    parser.add_argument("--text", default="dog", help="what to ask")
    parser.add_argument("--runs", type=int, default=5, help="fresh processes; medians are shown")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="query-client-") as scratch:
        uri = given.index or str(Path(scratch) / "index")
        if given.index is None:
            # In a process of its own: the peak memory of this one would count as that of its children.
            maker = get_context("spawn").Process(target=make_random_index, args=(uri,))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit("the random index could not be made; give one with --index")
        python = environment(Path(scratch) / "venv")
        sizes = installed(python)
        runs = [ask(python, uri, given.text) for _ in range(given.runs)]
        command = [once(python.parent / "probelog", uri, given.text) for _ in range(given.runs)]
    print(
        f"\n{uri}: {runs[0]['models']:,} models, {runs[0]['logits']:,} logits, {runs[0]['probes']:,} probes"
    )
    print(f"\n{'installed':<32}{'MB':>8}")
    print(f"{f'{len(sizes)} distributions':<32}{sum(sizes.values()) / 1e6:8.0f}")
    for name in sorted(sizes, key=lambda name: -sizes[name])[:5]:
        print(f"  {name:<30}{sizes[name] / 1e6:8.0f}")
    print(f"\n{f'medians of {given.runs} fresh processes':<32}{'ms':>8}")
    for step in runs[0]["times"]:
        print(f"{step:<32}{1000 * statistics.median(run['times'][step] for run in runs):8.0f}")
    print(f"{f'$ probelog search {given.text}':<32}{1000 * statistics.median(command):8.0f}")
    print(f"\n{'peak memory, MB':<32}{statistics.median(run['memory'] for run in runs):8.0f}")
    print(f"none of these is installed: {', '.join(UNWANTED)}")


def environment(folder: Path) -> Path:
    """A virtual environment with the project, not editable, and its base dependencies; returns its interpreter."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise SystemExit("uv is needed: run this with `uv run python tests/benchmarks/query_client.py`")
    python = folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True, cwd=CHECKOUT)
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, CHECKOUT],
        check=True,
        cwd=CHECKOUT,
    )
    return python


def installed(python: Path) -> dict[str, int]:
    """Bytes on disk of every distribution, compiled bytecode left out."""
    (folder,) = (python.parents[1] / "lib").glob("python*/site-packages")
    sizes: dict[str, int] = {}
    for distribution in distributions(path=[str(folder)]):
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
        sizes[distribution.metadata["Name"]] = sum(
            file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc"
        )
    return sizes


def ask(python: Path, uri: str, text: str) -> dict:
    """What one fresh process measures."""
    done = subprocess.run(
        [python, "-I", "-c", CHILD, uri, text, *UNWANTED],
        stdout=subprocess.PIPE,
        check=True,
        cwd=python.parent,
    )
    measured = json.loads(done.stdout)
    if measured["present"]:
        raise SystemExit(f"the query client's environment holds {', '.join(measured['present'])}")
    return measured


def once(command: Path, uri: str, text: str) -> float:
    """Seconds that the command line takes for one question."""
    started = time.perf_counter()
    subprocess.run([command, "search", text, "--index", uri], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def make_random_index(folder: str) -> None:
    sys.path.insert(0, str(CHECKOUT))
    from probelog.storage.store import Store
    from tests.support.worlds.small_index import Model, build

    labels = tuple(f"class {i}" for i in range(20))
    models = [Model(f"someone/model-{i}", labels) for i in range(50)]
    build(Store(folder), models=models, images=False, probes=2000)


if __name__ == "__main__":
    main()
