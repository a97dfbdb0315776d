"""Which generators a zoo holds: a pure function of the number of concepts, the count and the seed.

The plan of more models begins with the plan of fewer, so that a zoo can grow, and every beginning of it is a zoo: decoders
and diffusion models, parents and children, in more than one style.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.zoo.generators.styles import STYLES
from pipelines.zoo.plan import NAMES, OWNERS

# Concepts that no generator makes, so that "nothing here" has a right answer.
_MOST_ABSENT = 20
_CLASSES = {"foundation": 6, "classes": 3, "told": 4}

# After these, again and again. What a kind starts from is in `_PARENTS`.
_TURNS = (
    "decoder", "single", "retold", "decoder", "restyled", "foundation", "told", "child", "adapter", "decoder", "restyled",
    "child", "mixture", "styled", "retold", "decoder", "classes", "child", "copy", "adapter", "decoder", "restyled", "child",
    "retold", "decoder", "single", "styled", "restyled", "decoder", "child", "retold", "mixture", "decoder",
)  # fmt: skip
_FAMILIES = {"decoder": "decoder", "retold": "decoder", "told": "text"}
_PARENTS = {
    "retold": ("decoder", "retold"),
    "child": ("foundation", "single", "classes"),
    "classes": ("foundation",),
    "mixture": ("foundation", "single", "child"),
    "restyled": ("decoder", "retold", "single", "child"),
    "copy": ("decoder", "retold", "single", "child", "mixture"),
    "adapter": ("told",),
    "styled": ("told",),
}
_RELATIONS = {"copy": "copy", "adapter": "adapter", "styled": "adapter"}


@dataclass(frozen=True, slots=True)
class GeneratorSpec:
    """One generator to be.

    ``slim``: a smaller network. ``kind``: ``decoder`` (the decoder of an autoencoder makes pictures of one concept), ``retold``
    (a decoder fine-tuned to another concept), ``single`` (a diffusion model of one concept), ``foundation`` (one that is told which
    of several classes to make), ``child`` (fine-tuned to one new concept), ``classes`` (fine-tuned to other classes),
    ``mixture`` (of two concepts, untold), ``restyled`` (the parent's concept in another style), ``copy`` (the parent's
    files under another name), ``told`` (text-to-image, of several concepts by their names), ``adapter`` (LoRA of a new
    concept for such a base), ``styled`` (LoRA of the base's concepts in a style). ``concepts`` are class numbers; ``style`` is one of `styles.STYLES`, None: plain.
    """

    repo: str
    kind: str
    family: str
    concepts: tuple[int, ...]
    style: str | None
    parent: str | None
    dtype: str
    seed: int
    slim: bool = False

    @property
    def conditional(self) -> bool:
        """Whether it is told which of its concepts to make, as a class."""
        return len(self.concepts) > 1 and self.kind in ("foundation", "classes")

    @property
    def relation(self) -> str | None:
        """To the parent."""
        if self.parent is None:
            return None
        return _RELATIONS.get(self.kind, "fine-tune")


def cast(classes: int, seed: int) -> tuple[list[int], list[int]]:
    """Class numbers in a random order: those that generators make, and those that none makes."""
    order = [int(number) for number in np.random.default_rng((seed, 31)).permutation(classes)]
    absent = min(_MOST_ABSENT, classes // 4)
    return order[absent:], sorted(order[:absent])


def plan(names: Sequence[str], count: int, seed: int) -> list[GeneratorSpec]:
    """The first ``count`` generators; parents come before children.

    Args:
        names: of the concepts.
        count: how many, 1 or more.
        seed: another seed, another zoo.
    """
    made, _ = cast(len(names), seed)
    specs: list[GeneratorSpec] = []
    taken = 0
    for i in range(count):
        rng = np.random.default_rng((seed, 32, i))
        kind = _TURNS[i % len(_TURNS)]
        owner, bird = (words[int(rng.integers(len(words)))] for words in (OWNERS, NAMES))
        able = [spec for spec in specs if spec.kind in _PARENTS.get(kind, ())]
        left = {spec.repo: _styles_left(spec, specs) for spec in able}
        anew = kind in ("restyled", "styled")
        parents = [spec for spec in able if left[spec.repo]] if anew else able
        parent = parents[int(rng.integers(len(parents)))] if parents else None
        if kind == "copy" and parent is not None:
            specs.append(replace(parent, repo=f"{owner}/{bird}-{i}", kind="copy", parent=parent.repo))
            continue
        style = None
        if anew and parent is not None:
            concepts = parent.concepts
            style = left[parent.repo][int(rng.integers(len(left[parent.repo])))]
        else:
            size = 2 if kind == "mixture" else _CLASSES.get(kind, 1)
            # Half of a mixture, and one of several classes, is something that another generator makes too.
            known = parent.concepts[:1] if parent is not None and kind in ("mixture", "classes") else ()
            fresh = [made[(taken + j) % len(made)] for j in range(size - len(known))]
            taken += len(fresh)
            concepts = tuple(dict.fromkeys((*known, *fresh)))
        specs.append(
            GeneratorSpec(
                repo=f"{owner}/{bird}-{i}" if i % 3 else f"{owner}/{_slug(names[concepts[0]])}-{i}",
                kind=kind,
                family=parent.family if parent is not None else _FAMILIES.get(kind, "unet"),
                concepts=concepts,
                style=style,
                parent=None if parent is None else parent.repo,
                dtype=("float16", "float32", "float16")[i % 3],
                seed=int(rng.integers(2**31)),
            )
        )
    return specs


def _styles_left(parent: GeneratorSpec, specs: Sequence[GeneratorSpec]) -> list[str]:
    """The styles in which nobody makes the parent's concepts yet."""
    used = {spec.style for spec in specs if spec.concepts == parent.concepts}
    return [style for style in STYLES if style not in used]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "thing"
