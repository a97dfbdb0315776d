"""What the digests of preprocessed probes cost: filling the node's cache, reading it, and their share of a forward pass.

    python -m tests.benchmarks.pixels [--probes 256] [--size 224] [--models resnet18 mobilenetv3_small_050]

Processor time of one thread, medians of five rounds in which every way takes its turn. *Mapped* is how models read before
there were digests: copies of rows of a mapped array.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from probelog.inference import pixel_cache
from probelog.inference.pixel_cache import DIGEST_BYTES, PixelCache, cached_pixels
from probelog.models.preprocessing import timm_recipe

_BATCH, _ROUNDS = 32, 5


def pixels(count: int, size: int) -> dict[str, float]:
    """Seconds a probe for each step."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(count)]
    images = [image.resize((500, 375)) for image in noise]
    recipe = timm_recipe({"input_size": [3, size, size]}, size)
    digest = pixel_cache._digest
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(_ROUNDS):
        for name, used in (("without digests", lambda _: bytes(DIGEST_BYTES)), ("with digests", digest)):
            pixel_cache._digest = used
            with tempfile.TemporaryDirectory() as folder:
                cache = PixelCache(Path(folder, "pixels"), 1 << 40, probe_set="", count=count)
                begun = time.process_time()
                digests = cache.prepare(recipe, lambda chosen: [images[i] for i in chosen], range(count))
                seconds[f"fill, {name}"].append(time.process_time() - begun)
                begun = time.process_time()
                cache.prepare(recipe, lambda chosen: [images[i] for i in chosen], range(count))
                seconds[f"nothing to fill, {name}"].append(time.process_time() - begun)
                with cached_pixels(
                    cache.folder, recipe, range(count), digests, probe_set="", count=count
                ) as seen:
                    assert seen is not None
                    begun = time.process_time()
                    for start in range(0, count, _BATCH):
                        seen.rows(range(start, min(start + _BATCH, count)))
                    seconds[f"read, {name}"].append(time.process_time() - begun)
                (array,) = cache.folder.iterdir()
                shape = (count, *recipe.shape)
                begun = time.process_time()
                mapped = np.memmap(
                    array, recipe.dtype, "r", array.stat().st_size - int(np.prod(shape)), shape
                )
                for start in range(0, count, _BATCH):
                    mapped[np.arange(start, min(start + _BATCH, count))]
                seconds["read, mapped"].append(time.process_time() - begun)
    pixel_cache._digest = digest
    return {name: statistics.median(rounds) / count for name, rounds in seconds.items()}


def forward(model: str, size: int) -> float:
    """Seconds an image."""
    import timm
    import torch

    torch.set_num_threads(1)
    module, batch = timm.create_model(model, num_classes=10).eval(), torch.rand(16, 3, size, size)
    rounds = []
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            begun = time.process_time()
            module(batch)
            rounds.append(time.process_time() - begun)
    return statistics.median(rounds[1:]) / len(batch)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--probes", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--models", nargs="*", default=["resnet18", "mobilenetv3_small_050"])
    given = parser.parse_args()
    megabytes = 3 * given.size**2 / 1e6
    seconds = pixels(given.probes, given.size)
    print("| step | us a probe | MB/s |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {1e6 * value:.1f} | {megabytes / value:.0f} |")
    more = seconds["read, with digests"] - seconds["read, mapped"]
    print("\n| model | ms an image | more than mapped |\n|---|---:|---:|")
    for model in given.models:
        each = forward(model, given.size)
        print(f"| {model} | {1e3 * each:.2f} | {more / each:.2%} |")


if __name__ == "__main__":
    main()
