"""What it costs to sample a generator our way, beside the bare forward passes; and what adapters of one base cost.

    OMP_NUM_THREADS=1 uv run python -m tests.benchmarks.generator_price [--samples 64] [--steps 25] [--size small|tiny] [--rounds 3] [--base FOLDER]

Two random generators, a network of pixels and a latent pipeline (two networks, a text encoder, a decoder), side by side in one
run: *sampled* is a confined process of its own that loads, checks and samples one (`probelog.sandbox.generators`), *bare* the
forward passes of the same networks in this process, loaded before, in batches of the same size, with nothing between: the
least that any sampler can take. The price is their ratio, processor time by processor time, so that other programs disturb it little.

Then eight adapters of the latent pipeline: each loaded with its base and sampled beside it, and as workers do it, with a base
that is loaded, checked and sampled once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probelog.generators import seeds
from probelog.generators.loading import LoadOptions, load_generator
from probelog.sandbox.fork_server.client import ForkServer
from probelog.sandbox.generators import GeneratorProcess, generator_server
from probelog.sandbox.spec import GeneratorSpec, downloads_folder
from tests.support.worlds import tiny_generators

ADAPTERS = 8
SHA = "0" * 40
# About a million numbers each, at 32 pixels, as the zoo's; "tiny" ones are of a few thousand, where all is overhead.
UNET: dict[str, dict[str, Any]] = {
    "small": {"sample_size": 32, "block_out_channels": (32, 64, 64), "norm_num_groups": 8, "attention_head_dim": 16,
              "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")},
    "tiny": {},
}  # fmt: skip
LATENTS: dict[str, dict[str, int]] = {"small": {"channels": 32, "side": 16}, "tiny": {}}
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3, help="0 for the adapters alone")
    parser.add_argument("--size", choices=UNET, default="small")
    parser.add_argument("--base", type=Path, help="of the adapters: another pipeline of Stable Diffusion")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="generator-price-") as scratch:
        folder = downloads_folder(Path(scratch))
        tiny_generators.unconditional(folder / "pixels", **UNET[given.size])
        tiny_generators.text_to_image(folder / "latents", **LATENTS[given.size])
        if given.base is not None:
            shutil.copytree(given.base, folder / "base")
        base = folder / ("latents" if given.base is None else "base")
        for number in range(ADAPTERS):
            tiny_generators.adapter(folder / f"adapter-{number}", base, "peft", seed=number + 1)
        server = generator_server(Path(scratch))
        process = GeneratorProcess(server, GeneratorSpec(steps=given.steps, memory_bytes=4 << 30))
        numbers = range(given.samples)
        try:
            for name in ("pixels", "latents") if given.rounds else ():
                batch = _sampled(process, folder / name, numbers)
                bare = _bare(folder / name, given.samples, given.steps, batch)
                rows = []
                for _ in range(given.rounds):
                    ours = _seconds(server, lambda name=name: _sampled(process, folder / name, numbers))  # type: ignore[misc]
                    rows.append((ours, _seconds(server, bare)))
                price = statistics.median(ours / plain for ours, plain in rows)
                seconds = [statistics.median(column) for column in zip(*rows, strict=True)]
                print(
                    f"{name}: sampled {seconds[0]:.2f} s, bare {seconds[1]:.2f} s (batches of {batch}), price {price:.3f}"
                )
            _adapters(server, process, base, numbers)
        finally:
            process.close()
            server.close()


def _seconds(server: ForkServer, run: Callable[[], Any]) -> float:
    """Processor seconds of this process, of the server and of all that it forked."""
    before = _used(server)
    run()
    return _used(server) - before


def _used(server: ForkServer) -> float:
    time.sleep(0.3)  # the last process ends
    server.status(
        server._control, 0
    )  # a request has the server take the status, and the time, of who has ended
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS + time.process_time()


def _sampled(process: GeneratorProcess, folder: Path, numbers: range) -> int:
    """Load and sample one; the size of its batches."""
    process.load(folder, f"some/{folder.name}", SHA, 600)
    made = process.sample(numbers, 3600)
    process.release()
    return made.batch_size


def _bare(folder: Path, samples: int, steps: int, batch: int) -> Callable[[], None]:
    """The forward passes of a generator's networks."""
    made = load_generator(folder, LoadOptions(steps=steps))
    modules: dict[str, Any] = dict(made.modules)
    noise = torch.stack(
        [torch.from_numpy(seeds.noise(0, made.architecture, one, made.shape)) for one in range(batch)]
    )
    text = (
        torch.zeros(2 * batch, 16, modules["text_encoder"].config.hidden_size) if "vae" in modules else None
    )

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, samples, batch):
                some = noise[: min(batch, samples - start)]
                for step in range(steps):
                    if text is None:
                        modules["unet"](some, step, return_dict=False)
                    else:
                        both = torch.cat([some, some])
                        modules["unet"](
                            both, step, encoder_hidden_states=text[: len(both)], return_dict=False
                        )
                if text is not None:
                    modules["vae"].decode(some, return_dict=False)

    return run


def _adapters(server: ForkServer, process: GeneratorProcess, base: Path, numbers: range) -> None:
    names = [base.parent / f"adapter-{number}" for number in range(ADAPTERS)]

    def beside() -> None:
        for name in names:
            process.load(name, f"some/{name.name}", SHA, 600, base)
            process.sample(numbers, 3600)
            process.release()

    def once() -> None:
        digest = None
        for name in names:
            process.load(name, f"some/{name.name}", SHA, 600, base, digest)
            process.sample(numbers, 3600, base=False)
            process.release()
            if digest is None:
                digest = process.load(base, "some/base", SHA, 600).facts["weight_digest"]
                process.sample(numbers, 3600)
                process.release()

    before, after = _seconds(server, beside), _seconds(server, once)
    print(
        f"{ADAPTERS} adapters: each beside its base {before:.2f} s, base once {after:.2f} s, {after / before:.2f}"
    )


if __name__ == "__main__":
    main()
