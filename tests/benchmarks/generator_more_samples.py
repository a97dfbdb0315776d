"""More samples of a zoo's generators than their index has, as a second ledger for `evaluate --store`.

    uv run python -m tests.benchmarks.generator_more_samples ZOO STORE OUT [--samples 2400]
    uv run probelog-index evaluate --kind generator --index STORE --truth ZOO/truth.json --store OUT/store --samples 64

ZOO is what `probelog-index zoo --generators` made, or has made so far; STORE has an index with its encoder. They are sampled as the
product samples them (``precision = "auto"``): adapters added to their base, text pipelines with the same prompts and guidance; a copy has the
original's samples. Decoders, which take seconds, come first. Ended at any moment, the same call goes on, also one for more samples;
with `--part 1/2` and `--part 2/2` two processes draw, and a call without writes the ledger of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.generators.loading import LoadOptions, load_generator
from probelog.generators.sampling import Sampler
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer
from probelog.search.client import Index
from probelog.storage.layout import sample_ledger
from probelog.storage.ledger import SAMPLED, Ledger, item_key
from probelog.storage.store import Store
from tests.benchmarks.generator_galleries import SHA, result

_SEED, _BATCH, _AT_ONCE = 0, 64, 256
_SECONDS_FIRST = ("AutoencoderKL", "DDIMPipeline", "DDPMPipeline", "StableDiffusionPipeline", "lora")


def main() -> None:
    """Draw what is missing, and write the ledger of all that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    parser.add_argument("store", type=Path, help="with an index")
    parser.add_argument("out", type=Path, help="a folder for the samples' features and the ledger")
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--part", default="1/1", help="which of how many processes this is")
    parser.add_argument("--minutes", type=float, default=1e9, help="nothing is begun after so many")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    part, parts = (int(number) for number in arguments.part.split("/"))
    every = json.loads((arguments.zoo / "truth.json").read_text())["generators"]
    originals = {item["repo"]: item["parent"] for item in every if item["relation"] == "copy"}
    facts = sorted(
        (item for item in every if item["repo"] not in originals),
        key=lambda item: _SECONDS_FIRST.index(item["pipeline"]),
    )
    folder = find_index(str(arguments.store))
    generation = Generation(folder, read_pointer(folder)[0])
    with Index(folder, generation) as index:
        for item in facts[part - 1 :: parts]:
            drawn = _draw(arguments.zoo / "hub", item, arguments.out, arguments.samples, index, end)
            if drawn:
                print(f"{item['repo']}: {drawn} more, {time.process_time():.0f} s of processor", flush=True)
    if parts > 1:
        return
    ledger = Ledger(Store(arguments.out / "store"), sample_ledger(f"more{arguments.samples}"), SAMPLED)
    done = []
    for item in every:
        features = _drawn(_file(arguments.out, originals.get(item["repo"], item["repo"])))
        if len(features) < arguments.samples:
            continue
        rows = features[: arguments.samples].astype(np.float32)
        made = result(item["repo"], item["pipeline"], [], rows, generation.settings.encoder_digest)
        done.append(item_key(item["repo"], SHA))
        ledger.spool(done[-1], made)
    ledger.seal(done)
    print(f"{len(done)} of {len(every)} generators in {arguments.out / 'store'}")


def _draw(hub: Path, fact: Mapping[str, Any], out: Path, samples: int, index: Index, end: float) -> int:
    """Draw the samples that a generator's file lacks, and add them to it, some at a time: how many there were."""
    file = _file(out, fact["repo"])
    features = [*_drawn(file)]
    had = count = len(features)
    if count >= samples or time.monotonic() > end:
        return 0
    base = hub / fact["parent"] if fact["relation"] == "adapter" else None
    sampler = _sampler(hub / fact["repo"], base)
    while count < samples and time.monotonic() < end:
        pixels = sampler.sample(range(count, min(count + _AT_ONCE, samples)), base=False).pixels
        embedded = index.embed_images([Image.fromarray(one) for one in pixels])
        features += [*embedded.astype(np.float16)]
        count = len(features)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, np.stack(features))
        partial.rename(file)
    return count - had


def _file(out: Path, repo: str) -> Path:
    return out / "features" / f"{repo}.npy"


def _drawn(file: Path) -> npt.NDArray[np.float16]:
    """Features (n, d) that are there, the index's own samples first."""
    if not file.is_file():
        return np.empty((0, 0), np.float16)
    found: npt.NDArray[np.float16] = np.load(file)
    return found


def _sampler(folder: Path, base: Path | None) -> Sampler:
    """Samples the generator in a folder; of an adapter beside its base's."""
    import torch

    made = load_generator(folder, LoadOptions(), base)
    for network in made.modules.values():
        # A third faster on a CPU.
        torch.nn.Module.to(network, memory_format=torch.channels_last)
    return Sampler(made, seed=_SEED, batch_size=_BATCH, lower="bfloat16")


if __name__ == "__main__":
    main()
