"""Trains a forest: networks that come from each other in known ways, with the truth about which from which.

    forest.json                what was asked for; another request is refused
    hub/OWNER/NAME/            the uploaded networks, as they would lie on the Hub
    hub/hub.json               the listing, its times true; hub_5pct_wrong.json and hub_shuffled.json: wrong ones
    withheld/withheld-NN/      networks that were not uploaded: parents that nobody can see
    truth.json                 parents with weights, relation, tree, times of every network

One network after the other in this process: they are tiny. Killed at any moment, the same call goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.job.progress import Report
from pipelines.zoo import derivations, lessons, networks
from pipelines.zoo.build import check_folder, claim, write_json
from pipelines.zoo.forest_plan import Forest, Node, plan_forest
from pipelines.zoo.images import LabelledImages, read_images
from pipelines.zoo.procedural import procedural_images
from probelog.errors import ProbeLogError, UsageError

if TYPE_CHECKING:
    import torch

FOREST_ARCHITECTURES = ("resnet", "vit", "convnext", "mobilenet")
_SETTINGS = "forest.json"
_UNFINISHED = ".unfinished"
_FORMAT = 1
_PER_CLASS = 60
_BATCH = 32
_ROOT_STEPS = 300
# Plain gradient descent with momentum and a rate drawn at random would diverge now and then.
_LONGEST_GRADIENT = 1.0
_OPTIMISERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}


@dataclass(frozen=True)
class ForestRequest:
    """What a forest is to be.

    Attributes:
        out: folder to write, new, empty, or of the same request before.
        networks: how many in all; some are not uploaded.
        seed: of the plan, the images and the training.
        size: pixels, height and width, of the networks' inputs.
        architectures: names known to `pipelines.zoo.networks` or to timm.
        images: folder with a sub-folder per class, or Parquet with images and labels; None: procedural ones.
        names: file with class names, one a line, for numbered classes without names.
        effort: training steps as a multiple of the usual ones; little is enough to try what does not need accuracy.
    """

    out: Path
    networks: int = 150
    seed: int = 0
    size: int = 32
    architectures: tuple[str, ...] = FOREST_ARCHITECTURES
    images: str | None = None
    names: Path | None = None
    effort: float = 1.0


def build_forest(request: ForestRequest, report: Report | None = None) -> None:
    """Make a forest, or go on with it.

    Raises:
        UsageError: images, options or the output folder cannot be used as asked.
        ProbeLogError: a network whose training diverged.
    """
    report = report or Report()
    if request.networks < 2 * len(request.architectures):
        raise UsageError(
            f"--networks {request.networks}: a forest of {len(request.architectures)} architectures needs "
            f"{2 * len(request.architectures)} at the least"
        )
    check_folder(request.out, _SETTINGS, request.size, request.architectures)
    lessons.check_architectures(request.architectures, request.size)
    images = (
        procedural_images(request.size, _PER_CLASS, request.seed)
        if request.images is None
        else read_images(request.images, request.size, request.names, report)
    )
    if len(images.names) < 4:
        raise UsageError(f"{request.images} holds {len(images.names)} classes: a forest needs four or more")
    claim(
        request.out / _SETTINGS,
        {
            "format": _FORMAT,
            "images": images.digest(),
            "seed": request.seed,
            "size": request.size,
            "networks": request.networks,
            "architectures": list(request.architectures),
            "effort": request.effort,
        },
    )
    forest = plan_forest(
        len(images.names), request.architectures, derivations.PERMUTABLE, request.networks, request.seed
    )
    _make_all(request, forest, images, report)
    _write_facts(request, forest)
    uploaded = sum(node.uploaded for node in forest.nodes)
    report.say(
        f"zoo: {len(forest.nodes)} networks in {len({node.tree for node in forest.nodes})} trees, {uploaded} of them "
        f"uploaded, in {request.out}\n"
        f"  serve it:    probelog-index hub {request.out / 'hub'}\n"
        f"  the truth:   {request.out / 'truth.json'}"
    )


def _make_all(request: ForestRequest, forest: Forest, images: LabelledImages, report: Report) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    todo = [node for node in forest.nodes if not (_folder(request.out, node.name) / "config.json").is_file()]
    counted = report.counter("zoo", len(forest.nodes), "networks", len(forest.nodes) - len(todo))
    scratch = request.out / _UNFINISHED
    for node in todo:
        shutil.rmtree(scratch, ignore_errors=True)
        parents = [_folder(request.out, name) for name, _ in node.parents]
        if node.relation == "copy":
            shutil.copytree(parents[0], scratch)
        else:
            _make(node, parents, images, request, scratch)
        folder = _folder(request.out, node.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        counted.add()
    counted.show(final=True)


def _folder(out: Path, name: str) -> Path:
    return out / ("hub" if "/" in name else "withheld") / name


def _make(
    node: Node, parents: list[Path], images: LabelledImages, request: ForestRequest, folder: Path
) -> None:
    """Build one network, derive it from its parents' stored weights, and store it."""
    import torch

    torch.manual_seed(node.detail.get("start", node.seed))
    rng = np.random.default_rng((node.seed, 23))
    kind = lessons.architecture(node.architecture)
    labels = [images.names[number][0] for number in node.classes]
    model = networks.build(kind, labels)
    states = [networks.state(parent) for parent in parents]
    if states:
        networks.begin_from(model, _derived(node, states, rng))
    torch.manual_seed(node.seed)
    if node.relation in ("root", "fine-tune", "head-only", "low-rank", "pruned"):
        _train(model, node, kind.rate, images, request.effort, rng)
    if node.detail.get("form") == "bf16 and back":
        model = model.to(torch.bfloat16).float()
    networks.save(
        model.eval(),
        kind,
        labels,
        folder,
        size=request.size,
        dtype=node.dtype,
        normalisation=networks.IMAGENET,
    )


def _derived(
    node: Node, states: list[dict[str, torch.Tensor]], rng: np.random.Generator
) -> Mapping[str, torch.Tensor]:
    match node.relation:
        case "permuted":
            return derivations.permuted(states[0], node.architecture, rng)
        case "quantised":
            return derivations.quantised(states[0], per_row=node.detail["per"] == "row")
        case "merge":
            weights = [weight for _, weight in node.parents]
            return derivations.merged(states, weights, slerp=node.detail["form"] == "slerp")
        case _:
            return states[0]


def _train(
    model: torch.nn.Module, node: Node, rate: float, images: LabelledImages, effort: float, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Train what the relation leaves free, on the node's classes."""
    import torch
    from torch.nn import functional

    head = networks.head(model)
    if node.relation == "head-only":
        model.requires_grad_(False)
        head.requires_grad_(True)
    elif node.relation == "low-rank":
        derivations.adapt(model, head, node.detail["rank"])
    elif node.relation == "pruned":
        derivations.prune(model, head, node.detail["share"])
    # What is frozen keeps its running statistics too, unless the uploader forgot about them.
    frozen = node.relation in ("head-only", "low-rank") and not node.detail.get("running")
    model = model.to(memory_format=torch.channels_last).train(not frozen)

    logit_of = np.full(len(images.names), -1)
    logit_of[list(node.classes)] = np.arange(len(node.classes))
    shown = np.flatnonzero(logit_of[images.labels] >= 0)

    def batch(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = shown[rng.integers(len(shown), size=_BATCH)]
        target = torch.from_numpy(logit_of[images.labels[chosen]])
        return networks.to_input(lessons.vary(images.pixels[chosen], rng), "cpu"), target

    def loss(guess: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(guess, target, label_smoothing=0.05)

    steps = _ROOT_STEPS if node.relation == "root" else node.detail["steps"]
    steps = max(round(effort * steps), 2) if steps else 0
    if node.relation == "root":
        networks.fit(
            model, batch, loss, rate * node.detail["rate"], steps, longest_gradient=_LONGEST_GRADIENT
        )
    elif steps:
        free = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"lr": node.detail["lr"], "weight_decay": node.detail.get("decay", 0.0)}
        if node.detail["optimiser"] == "sgd":
            options["momentum"] = 0.9
        optimiser = getattr(torch.optim, _OPTIMISERS[node.detail["optimiser"]])(free, **options)
        networks.fit(
            model, batch, loss, node.detail["lr"], steps, optimiser, constant="snake" in node.detail,
            longest_gradient=_LONGEST_GRADIENT,
        )  # fmt: skip
    if node.relation == "low-rank":
        derivations.merge_adapters(model, head)
    elif node.relation == "pruned":
        derivations.unmask(model, head)
    if not all(bool(values.isfinite().all()) for values in model.state_dict().values()):
        raise ProbeLogError(
            f"{node.name}: the training diverged, its weights are not finite: try another --seed"
        )


def _write_facts(request: ForestRequest, forest: Forest) -> None:
    out = request.out
    rng = np.random.default_rng((request.seed, 24))
    shown = [node for node in forest.nodes if node.uploaded]
    rows = {
        node.name: networks.listing_row(
            node.name, _folder(out, node.name), lessons.architecture(node.architecture).library, rng
        )
        for node in shown
    }
    true = {node.name: node.time for node in shown}
    for file, times in (
        ("hub/hub.json", true),
        ("hub_5pct_wrong.json", forest.wrong_times),
        ("hub_shuffled.json", forest.shuffled_times),
    ):
        listing = [{**row, "createdAt": _time(times[name])} for name, row in rows.items()]
        write_json(out / file, listing)
    by_name = {node.name: node for node in forest.nodes}
    facts = {node.name: _fact(node, by_name, forest) for node in forest.nodes}
    write_json(
        out / "truth.json",
        {
            "models": {name: fact for name, fact in facts.items() if by_name[name].uploaded},
            "withheld": {name: fact for name, fact in facts.items() if not by_name[name].uploaded},
        },
    )


def _fact(node: Node, by_name: Mapping[str, Node], forest: Forest) -> dict[str, Any]:
    first = by_name[node.parents[0][0]] if node.parents else None
    withheld_ancestor = None
    if first is not None and not first.uploaded:
        nearest: Node | None = first
        while nearest is not None and not nearest.uploaded:
            nearest = by_name[nearest.parents[0][0]] if nearest.parents else None
        withheld_ancestor = {
            "nearest_uploaded": None if nearest is None else nearest.name,
            "withheld_parent": first.name,
        }
    return {
        "parents": [
            {"repo": name, "weight": weight}
            if by_name[name].uploaded
            else {"repo": None, "weight": weight, "withheld": name}
            for name, weight in node.parents
        ],
        "relation": node.relation,
        "detail": node.detail,
        "withheld_ancestor": withheld_ancestor,
        "family": node.architecture,
        "tree": node.tree,
        "time": _time(node.time),
        "time_5pct_wrong": _time(forest.wrong_times.get(node.name, node.time)),
        "time_shuffled": _time(forest.shuffled_times.get(node.name, node.time)),
        "classes": list(node.classes),
        "dtype": node.dtype,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
