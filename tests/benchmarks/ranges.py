"""Weights that are read in parts: bytes asked for against the models' size, and how well what is read agrees with all.

    uv run python -m tests.benchmarks.ranges [--scale 1.0] [--bench DIR]

Everything is read from a hub on loopback. The first table is of three untrained models of the sizes in use (a ViT-B of
float32 in one file, a ResNet-50, a decoder of 200 million parameters in bfloat16 and four shards; ``--scale`` makes them
narrower), each with a fine-tuned child whose rows moved by very different amounts, a child with merged adapters
of rank 8, a pruned one, and an independent one. A pair's distance (docs/method.md, section 11) is computed from all numbers,
from the sketches of the probing pass, and from blocks.

The second is of the trained models of the bench (by default ``../shared/bench``; skipped, aloud, where it is absent), which
are small: what the recovery of trees makes of both kinds of rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipelines.hubserver import create_app, serving
from pipelines.trees.remote import RemoteFacts, RemoteWeights
from probelog.hub.client import HubClient
from probelog.storage.schemas import CatalogueRow, RepoFile
from probelog.trees.families.tables import families
from probelog.trees.recovery.recover import recover
from probelog.weights.reader import LayerFacts, Weights, layer_table
from tests.benchmarks import trees

_BENCH = Path("../shared/bench")
_BYTES = 50_000_000

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """Names and shapes of a model, its type, and in how many files it lies."""

    name: str
    shapes: Shapes
    dtype: torch.dtype
    shards: int


def vision(scale: float) -> Architecture:
    width = int(768 * scale)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch.weight": (width, 3, 16, 16),
        "embeddings.position": (1, 197, width),
    }
    for layer in range(12):
        name = f"encoder.layer.{layer:02}"
        for part in ("query", "key", "value", "output"):
            shapes |= {f"{name}.{part}.weight": (width, width), f"{name}.{part}.bias": (width,)}
        shapes |= {f"{name}.up.weight": (4 * width, width), f"{name}.up.bias": (4 * width,)}
        shapes |= {f"{name}.down.weight": (width, 4 * width), f"{name}.down.bias": (width,)}
        for norm in ("before", "after"):
            shapes |= {f"{name}.layernorm_{norm}.weight": (width,), f"{name}.layernorm_{norm}.bias": (width,)}
    return Architecture("ViT-B, float32", shapes, torch.float32, 1)


def convolutional(scale: float) -> Architecture:
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (int(64 * scale), 3, 7, 7)}
    before = int(64 * scale)
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        inner = int(width * scale)
        for block in range(blocks):
            name = f"stages.{stage}.{block}"
            shapes |= {
                f"{name}.conv1.weight": (inner, before, 1, 1),
                f"{name}.conv2.weight": (inner, inner, 3, 3),
                f"{name}.conv3.weight": (4 * inner, inner, 1, 1),
            }
            for part, size in (("bn1", inner), ("bn2", inner), ("bn3", 4 * inner)):
                shapes |= {f"{name}.{part}.{kind}": (size,) for kind in ("weight", "bias", "running_mean")}
            before = 4 * inner
    return Architecture("ResNet-50, float32", shapes, torch.float32, 1)


def language(scale: float) -> Architecture:
    width = int(1024 * scale)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, width)}
    for layer in range(14):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (int(2.75 * width), width) for part in ("up", "gate")}
        shapes |= {f"{name}.mlp.down_proj.weight": (width, int(2.75 * width))}
        shapes |= {f"{name}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    return Architecture("decoder, bfloat16, 4 shards", shapes, torch.bfloat16, 4)


def initial(architecture: Architecture, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        .mul_(0.02 if len(shape) > 1 else 0.2)
        .to(architecture.dtype)
        for name, shape in architecture.shapes.items()
    }


def fine_tuned(parent: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Every layer and every row moves by another amount."""
    generator = torch.Generator().manual_seed(11)
    for name, values in parent.items():
        rows = torch.randn((len(values),) + (1,) * (values.dim() - 1), generator=generator).mul(0.7).exp()
        layer = float(torch.randn((), generator=generator).mul(0.4).exp())
        step = (
            torch.randn(values.shape, generator=generator)
            * rows
            * (0.05 * layer * float(values.float().std()))
        )
        yield name, (values.float() + step).to(values.dtype)


def adapted(parent: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Adapters of rank 8, merged into the matrices."""
    generator = torch.Generator().manual_seed(12)
    for name, values in parent.items():
        if values.dim() > 1:
            height, width = values.flatten(1).shape
            low_rank = torch.randn((height, 8), generator=generator) @ torch.randn(
                (8, width), generator=generator
            )
            yield name, (values.float() + low_rank.view_as(values) * (0.002 / 8**0.5)).to(values.dtype)
        else:
            yield name, values


def pruned(parent: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The smaller half of every matrix is zero."""
    for name, values in parent.items():
        limit = values.float().abs().flatten()[:100_000].median() if values.dim() > 1 else 0.0
        yield name, torch.where(values.float().abs() > limit, values, torch.zeros_like(values))


CHILDREN: dict[str, Callable[[Tensors], Iterator[tuple[str, torch.Tensor]]]] = {
    "fine-tuned": fine_tuned,
    "rank 8": adapted,
    "pruned": pruned,
}


def write(folder: Path, tensors: Tensors, shards: int) -> None:
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, where = sorted(tensors), {}
    for number in range(shards):
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in mine}, folder / shard)
        where |= dict.fromkeys(mine, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def read(endpoint: str, repo: str) -> tuple[RemoteFacts, float]:
    """A repository's weights in parts, and the seconds that this took."""
    with HubClient(endpoint) as client:
        facts = client.json(f"/api/models/{repo}").value
        files = [RepoFile(item["rfilename"]) for item in facts["siblings"]]
        begun = time.perf_counter()
        sampled = RemoteWeights(
            client, CatalogueRow(repo=repo, sha=facts["sha"], files=files), _BYTES
        ).sample()
        return sampled, time.perf_counter() - begun


def exact_distance(one: Path, two: Path) -> float:
    """Mean over matrices of ||a - b||^2 / (||a||^2 + ||b||^2), of all numbers."""
    ratios = []
    others: dict[str, torch.Tensor] = {}
    for file in sorted(two.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            others |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                a, b = tensors.get_tensor(name).float(), others[name].float()
                if a.dim() > 1:
                    ratios.append(float((a - b).square().sum() / (a.square().sum() + b.square().sum())))
    return float(np.mean(ratios))


def sketch_distance(one: Sequence[LayerFacts], two: Sequence[LayerFacts]) -> float:
    """The same from sketches."""
    ratios = [
        ((a.sketch - b.sketch) ** 2).sum() / ((a.sketch**2).sum() + (b.sketch**2).sum())
        for a, b in zip(one, two, strict=True)
        if a.sketch is not None and b.sketch is not None
    ]
    return float(np.mean(ratios))


def measure(architecture: Architecture, root: Path) -> None:
    """Print the lines of one architecture."""
    parent = initial(architecture, 1)
    names = ["parent", *CHILDREN, "independent"]
    write(root / "a/parent", parent, architecture.shards)
    for name, make in CHILDREN.items():
        write(root / f"a/{name.replace(' ', '-')}", dict(make(parent)), architecture.shards)
    write(root / "a/independent", initial(architecture, 2), architecture.shards)
    del parent
    sampled, whole = {}, {}
    with serving(create_app(root)) as endpoint:
        for name in names:
            repo = f"a/{name.replace(' ', '-')}"
            sampled[name], seconds = read(endpoint, repo)
            whole[name] = Weights(root / repo).read()[1].layers
            if name == "parent":
                found = sampled[name]
                print(
                    f"\n{architecture.name}: {len(architecture.shapes)} tensors, {found.size / 1e6:.0f} MB; asked for "
                    f"{found.asked / 1e6:.1f} MB ({found.asked / found.size:.1%}) in {found.requests} requests, {seconds:.1f} s"
                )
    print(f"  {'distance to':14} {'all numbers':>12} {'sketches':>12} {'blocks':>12} {'error of blocks':>16}")
    for name in names[1:]:
        exact = exact_distance(root / "a/parent", root / f"a/{name.replace(' ', '-')}")
        sketches = sketch_distance(whole["parent"], whole[name])
        blocks = sketch_distance(sampled["parent"].layers, sampled[name].layers)
        print(f"  {name:14} {exact:12.5f} {sketches:12.5f} {blocks:12.5f} {blocks / exact - 1:16.1%}")


def bench(folder: Path) -> None:
    """Print what the recovery makes of trained models by whole weights and by parts."""
    for case, root in (
        (trees.forest(folder / "forest", None), folder / "forest/hub"),
        (trees.hub(folder, None), folder / "hub"),
    ):
        with serving(create_app(root)) as endpoint:
            sampled = {repo: read(endpoint, repo)[0] for repo in sorted(case.truth)}
        asked, size = (sum(getattr(one, name) for one in sampled.values()) for name in ("asked", "size"))
        table = pa.concat_tables(layer_table(repo, "0" * 40, one.layers) for repo, one in sampled.items())
        print(
            f"\n{case.name}: {len(sampled)} models, {size / 1e6:.0f} MB; asked for {asked / 1e6:.1f} MB ({asked / size:.1%})"
        )
        independent = trees.independent_pairs(case.truth, (family.repos for family in families(case.weights)))
        for mode in case.modes:
            for name, one in (("whole", case), ("parts", replace(case, weights=table))):
                edges = recover(one.weights, one.facts(mode))
                row = trees.figures(case.truth, edges, independent).cells()
                print(f"  {mode:10} {name:6} " + "  ".join(f"{key} {value}" for key, value in row.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--scale", type=float, default=1.0, help="Width of the untrained models; 0 leaves them out."
    )
    parser.add_argument("--bench", type=Path, default=_BENCH)
    options = parser.parse_args(arguments)
    for make in (vision, convolutional, language) if options.scale else ():
        with tempfile.TemporaryDirectory() as folder:
            measure(make(options.scale), Path(folder))
    if (options.bench / "forest" / "truth.json").is_file():
        bench(options.bench)
    else:
        print(f"SKIPPED: there is no forest in {options.bench}", file=sys.stderr)


if __name__ == "__main__":
    main()
