"""More samples of a zoo's generators than their index has, as a second ledger for `evaluate --store`.

    uv run python -m tests.benchmarks.generator_more_samples ZOO STORE OUT [--samples 2400]
    uv run probelog-index evaluate --kind generator --index STORE --truth ZOO/truth.json --store OUT/store --samples 64

ZOO is what `probelog-index zoo --generators` made, STORE has an index of it. Decoders, which take seconds, come first. Ended at
any moment, the same call goes on; with `--part 1/2` and `--part 2/2` two processes draw, and a call without writes the ledger
of what is there. Adapters and copies are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

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

_SEED, _BATCH, _AT_ONCE = 0, 32, 256
_SECONDS_FIRST = ("AutoencoderKL", "DDIMPipeline", "DDPMPipeline", "StableDiffusionPipeline")


def main() -> None:
    """Draw what is missing, and write the ledger of all that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    parser.add_argument("store", type=Path, help="with the index")
    parser.add_argument("out", type=Path, help="a folder for the samples' features and the ledger")
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--part", default="1/1", help="which of how many processes this is")
    parser.add_argument("--minutes", type=float, default=1e9, help="no generator is begun after so many")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    part, parts = (int(number) for number in arguments.part.split("/"))
    facts = [
        item
        for item in json.loads((arguments.zoo / "truth.json").read_text())["generators"]
        if item["pipeline"] in _SECONDS_FIRST and item["relation"] != "copy"
    ]
    facts.sort(key=lambda item: _SECONDS_FIRST.index(item["pipeline"]))
    folder = find_index(str(arguments.store))
    generation = Generation(folder, read_pointer(folder)[0])
    with Index(folder, generation) as index:
        for item in facts[part - 1 :: parts]:
            file = _file(arguments.out, item["repo"])
            if not file.is_file() and time.monotonic() < end:
                features = _features(arguments.zoo / "hub" / item["repo"], arguments.samples, index)
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".partial.npy")
                np.save(partial, features.astype(np.float16))
                partial.rename(file)
                print(f"{item['repo']}: {len(features)}", flush=True)
    if parts > 1:
        return
    ledger = Ledger(Store(arguments.out / "store"), sample_ledger(f"more{arguments.samples}"), SAMPLED)
    done = [item for item in facts if _file(arguments.out, item["repo"]).is_file()]
    for item in done:
        features = np.load(_file(arguments.out, item["repo"])).astype(np.float32)
        made = result(item["repo"], item["pipeline"], [], features, generation.settings.encoder_digest)
        ledger.spool(item_key(item["repo"], SHA), made)
    ledger.seal([item_key(item["repo"], SHA) for item in done])
    print(f"{len(done)} generators in {arguments.out / 'store'}")


def _file(out: Path, repo: str) -> Path:
    return out / "features" / f"{repo}.npy"


def _features(folder: Path, samples: int, index: Index) -> npt.NDArray[np.float32]:
    """Features (samples, d) of what the generator in a folder makes, the index's own samples first."""
    import torch

    made = load_generator(folder, LoadOptions())
    for network in made.modules.values():
        # A third faster on a CPU.
        torch.nn.Module.to(network, memory_format=torch.channels_last)
    sampler = Sampler(made, seed=_SEED, batch_size=_BATCH)
    features = []
    for start in range(0, samples, _AT_ONCE):
        pixels = sampler.sample(range(start, min(start + _AT_ONCE, samples))).pixels
        features.append(index.embed_images([Image.fromarray(one) for one in pixels]))
    return np.concatenate(features)


if __name__ == "__main__":
    main()
