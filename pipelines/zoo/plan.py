"""Which models a zoo holds: a pure function of the classes, their groups, the architectures and the seed.

The plan of more models begins with the plan of fewer, so that a zoo can grow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count as counting
from pathlib import Path

import numpy as np

from pipelines.zoo.networks import declared_label
from probelog.errors import UsageError

Groups = Mapping[str, tuple[int, ...]]
Head = tuple[str, tuple[int, ...]]

SUBSET = (5, 40)
"""Classes of a model that knows a random subset, the fewest and the most."""

# Foundations know every class and are few; the others come in turns. Copies are rare, as on the Hub.
_FOUNDATIONS = (0, 6, 24)
_TURNS = (
    "inet", "wild", "child", "copy", "scratch", "inet", "inet", "child", "wild", "inet", "scratch", "inet",
    "child", "inet", "wild", "inet", "scratch", "inet", "child", "inet", "wild", "inet", "inet", "scratch",
)  # fmt: skip
_STYLES = ("plain", "plain", "LABEL", "plain", "underscore")
_DTYPES = ("float16", "float32", "float16", "bfloat16")
OWNERS = (
    "acorn", "briar", "clover", "delta-vision", "elderberry", "fennel", "gorse-lab", "hazel", "ivy", "larch",
    "marigold", "oakmoss", "primrose-ai", "rowan", "sedge", "tansy", "verbena", "woodruff", "yarrow", "zinnia",
)  # fmt: skip
NAMES = (
    "bittern", "curlew", "dunlin", "egret", "fulmar", "grebe", "hobby", "jackdaw", "kittiwake", "lapwing", "merlin",
    "nuthatch", "osprey", "pipit", "redstart", "siskin", "teal", "wagtail", "whimbrel", "yellowhammer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spec:
    """One model to be: logit i stands for the classes ``classes[i]``, is called ``names[i]``, declares ``labels[i]``.

    ``kind``: ``foundation`` (every class), ``inet`` (a random subset, fine-tuned from a foundation), ``scratch`` (a
    random subset, from nothing), ``child`` (fine-tuned from another model on other classes), ``wild`` (superclasses
    and odd spellings, fine-tuned from a foundation), ``copy`` (its parent's files under another name).
    """

    repo: str
    architecture: str
    kind: str
    classes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    dtype: str
    normalisation: str
    parent: str | None
    seed: int

    def to_json(self) -> str:
        """Everything that decides how the model comes out, apart from images and effort."""
        return json.dumps(asdict(self), sort_keys=True)


def plan(
    names: Sequence[Sequence[str]], groups: Groups, architectures: Sequence[str], count: int, seed: int
) -> list[Spec]:
    """The first ``count`` models; parents come before children.

    Args:
        names: for each class its name and its synonyms.
        groups: superclass -> class numbers.
        architectures: names that networks can be built by.
        count: how many models, 1 or more.
        seed: another seed, another zoo.
    """
    rng = np.random.default_rng((seed, 11))
    specs: list[Spec] = []
    turn = counting()
    for i in range(count):
        foundations = [spec for spec in specs if spec.kind == "foundation"]
        subsets = [spec for spec in specs if spec.kind in ("inet", "child", "scratch")]
        if i in _FOUNDATIONS and len(foundations) < len(architectures):
            kind = "foundation"
        else:
            kind = _TURNS[next(turn) % len(_TURNS)]
        # Everything is drawn whether it is needed or not: one kind's draws do not shift another's.
        start = foundations[int(rng.integers(len(foundations)))] if foundations else None
        other = subsets[int(rng.integers(len(subsets)))] if subsets else None
        fresh = architectures[int(rng.integers(len(architectures)))]
        owner, name = (words[int(rng.integers(len(words)))] for words in (OWNERS, NAMES))
        model_rng = np.random.default_rng((seed, 12, i))
        repo = f"{owner}/{name}-{i}"
        if kind == "copy":
            assert other is not None
            specs.append(replace(other, repo=repo, kind="copy", parent=other.repo))
            continue
        heads: list[Head]
        if kind == "foundation":
            fresh = architectures[len(foundations)]
            repo, parent = f"foundation/{fresh.replace('/', '-')}", None
            heads = [(own_names[0], (number,)) for number, own_names in enumerate(names)]
        elif kind == "scratch":
            parent, heads = None, _subset(names, model_rng, ())
        elif kind == "child":
            assert other is not None
            parent, fresh = other.repo, other.architecture
            heads = _subset(names, model_rng, [number for members in other.classes for number in members])
        else:
            assert start is not None
            parent, fresh = start.repo, start.architecture
            heads = _subset(names, model_rng, ()) if kind == "inet" else _wild(names, groups, model_rng)
        style = _STYLES[i % len(_STYLES)]
        if kind == "wild" and style != "LABEL":
            style = "plain"  # its names are odd already
        specs.append(
            Spec(
                repo=repo,
                architecture=fresh,
                kind=kind,
                classes=tuple(members for _, members in heads),
                names=tuple(label for label, _ in heads),
                labels=tuple(declared_label(label, j, style) for j, (label, _) in enumerate(heads)),
                dtype=_DTYPES[i % len(_DTYPES)],
                normalisation=("imagenet", "inception")[int(model_rng.integers(2))]
                if parent is None
                else next(spec.normalisation for spec in specs if spec.repo == parent),
                parent=parent,
                seed=int(model_rng.integers(2**31)),
            )
        )
    return specs


def _subset(names: Sequence[Sequence[str]], rng: np.random.Generator, avoid: Sequence[int]) -> list[Head]:
    """Random classes, none of those to avoid where two others are left."""
    able = [number for number in range(len(names)) if number not in set(avoid)]
    if len(able) < 2:
        able = list(range(len(names)))
    fewest = max(2, min(SUBSET[0], len(names) // 2))
    most = max(fewest, min(SUBSET[1], len(names) - 1))
    size = min(len(able), int(rng.integers(fewest, most + 1)))
    chosen = [able[int(i)] for i in rng.permutation(len(able))[:size]]
    return [(names[number][0], (number,)) for number in chosen]


def _wild(names: Sequence[Sequence[str]], groups: Groups, rng: np.random.Generator) -> list[Head]:
    """Superclasses that share no class, then single classes, each spelled in a way of its own."""
    heads: list[Head] = []
    taken: set[int] = set()
    order = [list(groups)[int(i)] for i in rng.permutation(len(groups))]
    for group in order[: int(rng.integers(1, 7))]:
        if not taken & set(groups[group]):
            heads.append((group, groups[group]))
            taken |= set(groups[group])
    for _, members in _subset(names, rng, sorted(taken)):
        if members[0] not in taken:
            synonyms = names[members[0]]
            heads.append((synonyms[int(rng.integers(len(synonyms)))], members))
    if len(heads) < 2:  # one group holds nearly everything
        heads = _subset(names, rng, ())
    spellings = [_SPELLINGS[int(i)] for i in rng.integers(len(_SPELLINGS), size=len(heads))]
    spelled = [(_spell(name, way), members) for (name, members), way in zip(heads, spellings, strict=True)]
    return [spelled[int(i)] for i in rng.permutation(len(spelled))]


_SPELLINGS = ("plain", "upper", "underscore", "plural", "title")


def _spell(name: str, way: str) -> str:
    if way == "plural":
        return name if name.endswith("s") else name + "s"
    return name.title() if way == "title" else declared_label(name, 0, way)


def last_word_groups(names: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """Superclasses that the names themselves tell of: ``Egyptian cat`` and ``Persian cat`` are both a ``cat``.

    Last words shared by two classes or more but not by all; a word that is a class's whole name is left out, since
    it names that class already.
    """
    whole = {name.casefold() for synonyms in names for name in synonyms}
    groups: dict[str, set[int]] = {}
    for number, synonyms in enumerate(names):
        for name in synonyms:
            words = name.casefold().split()
            if len(words) > 1 and words[-1] not in whole:
                groups.setdefault(words[-1], set()).add(number)
    return {
        word: tuple(sorted(members))
        for word, members in sorted(groups.items())
        if 2 <= len(members) < len(names)
    }


def read_groups(file: Path, names: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """Read ``{superclass: [class name, ...]}``; a class may be named by a synonym.

    Raises:
        UsageError: unreadable, of another form, an unknown class, or a superclass of fewer than two classes.
    """
    numbers = {name.casefold(): number for number, synonyms in enumerate(names) for name in synonyms}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: the groups cannot be read ({error})") from None
    if not isinstance(content, dict) or not all(
        name.strip() and isinstance(members, list) and all(isinstance(member, str) for member in members)
        for name, members in content.items()
    ):
        raise UsageError(f"{file} must hold a JSON object, superclass name: [class names]")
    groups: dict[str, tuple[int, ...]] = {}
    unknown: list[str] = []
    for name, members in content.items():
        named = set()
        for member in members:
            number = numbers.get(" ".join(member.replace("_", " ").split()).casefold())
            if number is None:
                unknown.append(member)
            else:
                named.add(number)
        if len(named) < 2 and not unknown:
            raise UsageError(f"{file}: the group {name!r} needs two classes or more")
        if name.casefold() in numbers:
            raise UsageError(f"{file}: the group {name!r} is called as one of the classes is")
        groups[name] = tuple(sorted(named))
    if unknown:
        listed = ", ".join(repr(name) for name in unknown[:10])
        raise UsageError(f"{file}: {len(unknown)} names are no class of the images: {listed}")
    return groups
