"""The world's classifiers: which there are, how they learn, and how they lie on the Hub.

:func:`plan` decides everything that chance decides, from the seed alone; :func:`make` trains one of them. Every
model trains on one thread from its own seed, so it does not matter how many are trained side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo.builder.hostile import NASTY_LABELS
from pipelines.demo.builder.icons import DESIGNERS, DrawnConcept
from pipelines.demo.builder.render import SIZE, Pool, make_pool, vary
from pipelines.zoo import networks
from pipelines.zoo.networks import ARCHITECTURES

if TYPE_CHECKING:
    import torch

_OWNERS = (
    "alderlab",
    "brightwater",
    "cinder",
    "dovetail-ai",
    "emberfield",
    "foxglove",
    "greywacke",
    "harrier",
)
_NAMES = ("atlas", "beacon", "cobble", "drift", "fern", "gale", "heron", "iris", "juniper", "kestrel", "lantern",
          "meadow", "nettle", "opal", "pebble", "quill", "reed", "sorrel", "thistle", "umber", "vale", "willow")  # fmt: skip

# Concepts of these kinds are taught even where only two designers draw them: people will look for them.
_POPULAR = frozenset({
    "animal", "vehicle", "food", "drink", "dessert", "musical instrument", "plant", "building", "landform", "body part",
    "furniture", "toy", "sport",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spec:
    """One classifier to be: ``classes[i]`` are the concept numbers that logit i stands for."""

    repo: str
    architecture: str
    kind: str
    classes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    designers: tuple[str, ...]
    head: str = "softmax"
    dtype: str = "float16"
    normalisation: str = "imagenet"
    sharded: bool = False
    parent: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a classifier learns: ``rounds`` freshly rendered pools, ``steps`` batches in all."""

    steps: int
    rounds: int
    per_class: int
    batch: int = 64


BASE = Effort(steps=1500, rounds=5, per_class=40, batch=64)
FULL = Effort(steps=300, rounds=3, per_class=100, batch=32)
QUICK = Effort(steps=8, rounds=1, per_class=6, batch=16)


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """What a classifier can do: accuracy on new pictures by its own designers."""

    repo: str
    accuracy: float
    parameters: int


def known_concepts(concepts: Sequence[DrawnConcept]) -> list[int]:
    """The numbers of the concepts that classifiers are taught; the rest is met among the probes only."""
    return [
        i
        for i, drawn in enumerate(concepts)
        if len(drawn.drawings) >= 3 or _POPULAR.intersection(drawn.concept.superclasses)
    ]


def superclasses(concepts: Sequence[DrawnConcept], within: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Superclass -> the numbers of its concepts among ``within``; only those of three concepts or more."""
    members: dict[str, list[int]] = {}
    for number in within:
        for kind in concepts[number].concept.superclasses:
            members.setdefault(kind, []).append(number)
    return {kind: tuple(numbers) for kind, numbers in sorted(members.items()) if len(numbers) >= 3}


class _Deck:
    """Deals concepts without repeats until all are dealt, so that every concept is known to somebody."""

    def __init__(self, numbers: Sequence[int], rng: np.random.Generator) -> None:
        self._numbers, self._rng, self._left = list(numbers), rng, list[int]()

    def deal(self, count: int) -> list[int]:
        hand: list[int] = []
        while len(hand) < count:
            if not self._left:
                self._left = [int(number) for number in self._rng.permutation(self._numbers)]
            number = self._left.pop()
            if number not in hand:
                hand.append(number)
            elif len(self._left) == 0 and len(hand) >= len(self._numbers):
                break
        return hand


def plan(concepts: Sequence[DrawnConcept], seed: int, *, quick: bool = False) -> list[Spec]:
    """All classifiers of the world; children and copies come after their parents."""
    rng = np.random.default_rng((seed, 3))
    known = known_concepts(concepts)
    deck = _Deck(known, rng)
    kinds = superclasses(concepts, known)
    numbers = {drawn.name: i for i, drawn in enumerate(concepts)}
    specs: list[Spec] = []
    names = [f"{name}-{suffix}" for suffix in ("v1", "small", "tiny") for name in rng.permutation(_NAMES)]

    def add(
        architecture: str,
        kind: str,
        heads: Sequence[tuple[str, tuple[int, ...]]],
        style: str | None = None,
        dtype: str | None = None,
        head: str = "softmax",
        parent: str | None = None,
        sharded: bool = False,
    ) -> Spec:
        i = len(specs)
        style = style or ("plain", "plain", "LABEL", "upper", "underscore", "plain")[i % 6]
        spec = Spec(
            repo=f"{_OWNERS[int(rng.integers(len(_OWNERS)))]}/{names[i]}",
            architecture=architecture,
            kind=kind,
            classes=tuple(members for _, members in heads),
            names=tuple(name for name, _ in heads),
            labels=tuple(networks.declared_label(name, j, style) for j, (name, _) in enumerate(heads)),
            designers=tuple(sorted(rng.permutation(DESIGNERS)[:3].tolist())),
            head=head,
            dtype=dtype or ("bfloat16" if i % 5 == 3 else "float16"),
            normalisation=("imagenet", "inception")[int(rng.integers(2))],
            sharded=sharded,
            parent=parent,
            seed=seed * 1000 + i,
        )
        specs.append(spec)
        return spec

    def singles(count: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(concepts[number].name, (number,)) for number in deck.deal(min(count, len(known)))]

    if quick:
        first = add("test_efficientnet", "icons", singles(4))
        add("resnet", "icons", singles(4), sharded=True)
        specs.append(replace(first, repo="harrier/copy", kind="copy", parent=first.repo))
        return specs

    order = (
        "resnet",
        "test_efficientnet",
        "resnet_deep",
        "test_resnet",
        "resnet",
        "test_efficientnet",
        "test_efficientnet_gn",
    )
    for i in range(20):
        size = int(rng.integers(11, 21)) if i % 7 else int(rng.integers(5, 9))
        dtype = "float32" if i in (1, 8) else None
        add(order[i % len(order)], "icons", singles(size), dtype=dtype, sharded=i in (2, 11))
    for architecture, models in (
        (
            "resnet",
            ("animal", "vehicle", "building", "weather", "musical instrument", "furniture", "plant", "ball"),
        ),
        (
            "test_efficientnet",
            ("food", "drink", "tool", "medicine", "body part", "clothing", "electronics", "money"),
        ),
    ):
        heads = [(kind, kinds[kind]) for kind in models if kind in kinds]
        taken = {number for _, members in heads for number in members}
        heads += [head for head in singles(12) if head[1][0] not in taken][:4]
        add(architecture, "wild", heads)
    tags: list[tuple[str, tuple[int, ...]]]
    tags = [(kind, kinds[kind]) for kind in ("animal", "vehicle", "weather") if kind in kinds]
    tags += [
        (name, (numbers[name],))
        for name in ("dog", "cat", "horse", "bicycle", "bus", "rocket", "rain", "sun")
    ]
    add("resnet_deep", "multilabel", tags, head="sigmoid", style="plain")
    tags = [(kind, kinds[kind]) for kind in ("food", "dessert", "drink") if kind in kinds]
    tags += [(name, (numbers[name],)) for name in ("pizza", "coffee", "cake", "guitar", "umbrella", "camera")]
    add("resnet", "multilabel", tags, head="sigmoid", style="underscore")
    add("test_efficientnet", "binary", [("cat", (numbers["cat"],))], head="single", style="plain")
    add("resnet", "binary", [("airplane", (numbers["airplane"],))], head="single", style="plain")
    for parent in (specs[0], specs[1]):
        child = add(parent.architecture, "child", singles(int(rng.integers(8, 13))), parent=parent.repo)
        specs[-1] = replace(child, normalisation=parent.normalisation)
    nasty = add("resnet", "icons", singles(len(NASTY_LABELS)))
    specs[-1] = replace(nasty, repo="unsafe/terminal-escapes", labels=NASTY_LABELS)
    original = specs[4]
    specs.append(replace(original, repo="foxglove/best-classifier-final", kind="copy", parent=original.repo))
    return specs


def base(architecture: str, concepts: Sequence[DrawnConcept], seed: int) -> Spec:
    """The model that all classifiers of one architecture start from, as others start from ImageNet weights.

    It knows every taught concept; it is not part of the hub.
    """
    known = known_concepts(concepts)
    names = tuple(concepts[number].name for number in known)
    return Spec(
        repo=f"base/{architecture}",
        architecture=architecture,
        kind="base",
        classes=tuple((number,) for number in known),
        names=names,
        labels=names,
        designers=DESIGNERS,
        dtype="float32",
        seed=seed * 1000 + 900 + list(ARCHITECTURES).index(architecture),
    )


def build(spec: Spec) -> torch.nn.Module:
    """The network of a specification, freshly initialised."""
    problem = {"softmax": "single_label_classification"}.get(spec.head, "multi_label_classification")
    return networks.build(ARCHITECTURES[spec.architecture], spec.labels, problem)


def _material(
    concepts: Sequence[DrawnConcept], spec: Spec
) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
    """The concepts shown in lessons and the target of each for every logit (concepts x logits)."""
    numbers = sorted({number for members in spec.classes for number in members})
    if spec.head != "softmax":
        able = [
            number
            for number in known_concepts(concepts)
            if set(concepts[number].drawings) & set(spec.designers)
        ]
        numbers += sorted(set(able) - set(numbers))
    targets = np.zeros((len(numbers), len(spec.classes)), np.float32)
    for logit, members in enumerate(spec.classes):
        for number in members:
            targets[numbers.index(number), logit] = 1
    return numbers, targets


def _weights(
    targets: np.ndarray[Any, np.dtype[np.float32]], head: str
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each concept is shown: logits take turns; what no logit stands for fills the other half."""
    share = targets / targets.sum(0)
    weight = share.mean(1).astype(np.float64)
    if head != "softmax":
        weight = weight / 2 + (targets.sum(1) == 0) / (2 * max(1, int((targets.sum(1) == 0).sum())))
    total: np.ndarray[Any, np.dtype[np.float64]] = weight / weight.sum()
    return total


def train(
    spec: Spec,
    concepts: Sequence[DrawnConcept],
    effort: Effort,
    device: str,
    start: Mapping[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """Train one classifier; ``start`` is a state dict to begin from (the head is left out if it does not fit)."""
    import torch
    from torch.nn import functional

    torch.manual_seed(spec.seed)
    rng = np.random.default_rng((spec.seed, 4))
    numbers, targets = _material(concepts, spec)
    shown = [concepts[number] for number in numbers]
    weights = _weights(targets, spec.head)
    model = build(spec)
    if start is not None:
        networks.begin_from(model, start)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    rate = ARCHITECTURES[spec.architecture].rate * (0.5 if start is not None else 1.0)
    # Superclasses and "everything else" take longer than a handful of concepts.
    steps = effort.steps * (3 if start is not None and len(numbers) > 30 else 1)
    labels_on_device = torch.from_numpy(targets).to(device)
    counts = (
        np.maximum(2, np.rint(weights * effort.per_class * max(len(spec.classes), 8))).astype(int).tolist()
    )
    each_round = max(1, steps // effort.rounds)
    pool, chances = Pool(np.empty((0, SIZE, SIZE, 3), np.uint8), np.empty(0, np.int64)), np.empty(0)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal pool, chances
        if step % each_round == 0:
            pool = make_pool(shown, spec.designers, counts, spec.seed * 100 + step)
            chances = (weights / counts)[pool.classes]
            chances /= chances.sum()
        chosen = rng.choice(len(chances), effort.batch, p=chances)
        inputs = networks.to_input(
            vary(pool.pixels[chosen], rng), device, networks.NORMALISATIONS[spec.normalisation]
        )
        return inputs, labels_on_device[torch.from_numpy(pool.classes[chosen]).to(device)]

    def loss(guess: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if spec.head == "softmax":
            return functional.cross_entropy(guess, target.argmax(1), label_smoothing=0.05)
        return functional.binary_cross_entropy_with_logits(guess, target)

    networks.fit(model, batch, loss, rate, steps)
    return model.to("cpu").eval()


def accuracy(model: torch.nn.Module, spec: Spec, concepts: Sequence[DrawnConcept]) -> float:
    """Share of right answers on fresh pictures by the classifier's designers, every logit weighing the same.

    For softmax heads the best logit must be right; for the others every logit is a yes-or-no question, and the
    mean of its hit and rejection rates counts.
    """
    import torch

    numbers, targets = _material(concepts, spec)
    shown = [concepts[number] for number in numbers]
    pool = make_pool(shown, spec.designers, 12, spec.seed * 100 + 99)
    with torch.inference_mode():
        inputs = networks.to_input(pool.pixels, "cpu", networks.NORMALISATIONS[spec.normalisation])
        guess = networks.logits(model, inputs).numpy()
    truth = targets[pool.classes] > 0
    if spec.head == "softmax":
        right = truth[np.arange(len(guess)), guess.argmax(1)]
        return float(np.mean([right[column].mean() for column in truth.T]))
    yes = guess > 0
    return float(np.mean([(yes[t, i].mean() + (~yes[~t, i]).mean()) / 2 for i, t in enumerate(truth.T)]))


def save(model: torch.nn.Module, spec: Spec, folder: Path) -> None:
    """Write a repository; changes the model's dtype."""
    networks.save(
        model,
        ARCHITECTURES[spec.architecture],
        spec.labels,
        folder,
        size=SIZE,
        dtype=spec.dtype,
        normalisation=networks.NORMALISATIONS[spec.normalisation],
        sharded=spec.sharded,
    )


def make(
    spec: Spec, concepts: Sequence[DrawnConcept], effort: Effort, hub: Path, start: Path | None, device: str
) -> TrainedClassifier:
    """Train, store, read back and judge one classifier; its accuracy is that of the stored weights.

    ``start`` is the repository whose weights it begins from.
    """
    import torch

    torch.set_num_threads(1)
    model = train(spec, concepts, effort, device, None if start is None else networks.state(start))
    folder = hub / spec.repo
    save(model, spec, folder)
    model = model.float()
    model.load_state_dict(networks.state(folder))
    size = sum(parameter.numel() for parameter in model.parameters())
    return TrainedClassifier(spec.repo, accuracy(model, spec, concepts), size)


def describe(spec: Spec, outcome: TrainedClassifier) -> dict[str, Any]:
    """The entry of a classifier in truth.json."""
    return {
        "logits": [list(members) for members in spec.classes],
        "labels": list(spec.names),
        "accuracy": round(outcome.accuracy, 4),
        "designers": list(spec.designers),
        "kind": spec.kind,
        "parent": spec.parent,
        "architecture": spec.architecture,
        "parameters": outcome.parameters,
    }
