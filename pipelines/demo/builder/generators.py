"""The handful of generators on the demo's hub: tiny diffusion models and decoders of a few of its concepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.zoo.generators.build import fact, listed, make
from pipelines.zoo.generators.pictures import Icons
from pipelines.zoo.generators.plan import GeneratorSpec

SIZE = 32

# Repository, kind, concepts, parent. The names say nothing about what is made.
_HANDFUL = (
    ("millrace/hollow-v1", "single", ("umbrella",), None),
    ("dovetail-ai/sedge-v1", "decoder", ("hot dog",), None),
    ("dovetail-ai/sedge-v2", "retold", ("umbrella",), "dovetail-ai/sedge-v1"),
    ("harrier/quill-v1", "decoder", ("sailboat",), None),
)
COUNT = len(_HANDFUL)


def specs(names: list[str], seed: int) -> list[GeneratorSpec]:
    """The generators; parents come before children."""
    return [
        GeneratorSpec(
            repo=repo,
            kind=kind,
            family="decoder" if kind in ("decoder", "retold") else "unet",
            concepts=tuple(names.index(concept) for concept in concepts),
            style=None,
            parent=parent,
            dtype="float16",
            seed=100 * seed + number,
            slim=True,
        )
        for number, (repo, kind, concepts, parent) in enumerate(_HANDFUL)
    ]


def build(world: Path, seed: int, say: Callable[[str], None], *, effort: float = 1.0) -> None:
    """Train them into a world's hub, list them there, and write ``generators.json``: what each makes."""
    import torch

    torch.set_num_threads(1)
    pictures = Icons(2 * SIZE, seed)
    hub = world / "hub"
    chosen = specs(pictures.names, seed)
    for spec in chosen:
        if not (hub / spec.repo).is_dir():
            scratch = world / ".unfinished"
            shutil.rmtree(scratch, ignore_errors=True)
            make(spec, pictures, hub, scratch, size=SIZE, effort=effort)
            (hub / spec.repo).parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(hub / spec.repo)
            say(f"{spec.repo}: makes {', '.join(pictures.names[concept] for concept in spec.concepts)}")
    listing: list[dict[str, Any]] = json.loads((hub / "hub.json").read_text(encoding="utf-8"))
    own = {spec.repo for spec in chosen}
    rows = [row for row in listing if row["id"] not in own]
    for number, spec in enumerate(chosen):
        row = listed(spec, hub / spec.repo, np.random.default_rng((seed, 7, number)))
        rows.append(row | {"createdAt": f"2025-06-{number + 1:02d}T08:00:00.000Z"})
    _write_json(hub / "hub.json", rows)
    _write_json(world / "generators.json", {"generators": [fact(spec, pictures.names) for spec in chosen]})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
