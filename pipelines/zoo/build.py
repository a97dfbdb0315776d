"""Makes a zoo in one folder, a model a Ray task; killed at any moment, the same call goes on.

    zoo.json            what was asked for; another request is refused
    hub/OWNER/NAME/     the models, as they would lie on the Hub; hub/hub.json: the listing
    entries/            a file per finished model, written after its folder: what it is and how good
    truth.json          what every logit stands for (`pipelines.evaluate.Truth`)
    queries.parquet     images of the classes that no model saw, with class numbers as in truth.json
    probes.parquet      images to probe with, of other classes where enough are there
    concepts.txt        names for the background

The tasks return files and this process alone writes, so that the workers of a cluster need no shared folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.runtime.session import session, worker_count
from cluster.runtime.task_graph import run_families
from pipelines.job.progress import Report
from pipelines.zoo import lessons, networks
from pipelines.zoo.images import MAX_SIZE, LabelledImages, read_images
from pipelines.zoo.lessons import FEWEST_IMAGES, Material, Split, Trained
from pipelines.zoo.plan import Groups, Spec, last_word_groups, plan, read_groups
from probelog.errors import ProbeLogError, UsageError

ARCHITECTURES = ("test_resnet", "test_efficientnet", "resnet", "mobilenetv3_small_050")
_MOST_PROBES = 4000
# With so many classes, a fifth of them is kept from the models, for probes of other classes as in the papers.
_MANY_CLASSES = 40
_SETTINGS = "zoo.json"
_UNFINISHED = ".unfinished"
_FORMAT = 1


@dataclass(frozen=True)
class Request:
    """What a zoo is to be.

    Attributes:
        images: folder with a sub-folder per class, or Parquet with images and labels.
        out: folder to write, new, empty, or of the same request before.
        models: how many repositories; may grow from one call to the next.
        seed: of the plan, the split and the training.
        size: pixels, height and width, of the models' inputs.
        epochs: passes of a model over its images; None: a fixed number of batches.
        architectures: names known to `pipelines.zoo.networks` or to timm.
        names: file with class names, one a line, for numbered classes without names.
        groups: JSON file, superclass -> class names; None: last words that names share.
        probes: how many probes at the most; None: what is left over, up to 4,000.
        probe_classes: classes that no model learns; None: a fifth of 40 classes or more, else none.
    """

    images: str
    out: Path
    models: int = 12
    seed: int = 0
    size: int = 64
    epochs: int | None = None
    architectures: tuple[str, ...] = ARCHITECTURES
    names: Path | None = None
    groups: Path | None = None
    probes: int | None = None
    probe_classes: int | None = None


@dataclass(frozen=True)
class _Classes:
    """The images with their classes renumbered: those of the hub first, then those of the probes alone."""

    images: LabelledImages
    labels: np.ndarray[Any, np.dtype[np.int64]]
    hub: list[list[str]]
    apart: list[list[str]]


def build_zoo(
    request: Request,
    report: Report | None = None,
    *,
    workers: int | None = None,
    gpus_per_model: float = 0.0,
    ray_address: str | None = None,
) -> None:
    """Make a zoo, or go on with it.

    Args:
        request: what to make.
        report: who is told.
        workers: models trained at the same time; by default as many as the machines hold.
        gpus_per_model: a share of a GPU, or several; 0 trains on CPUs.
        ray_address: a cluster; by default ``RAY_ADDRESS``, else this machine.

    Raises:
        UsageError: images, options or the output folder cannot be used as asked.
        ProbeLogError: models that could not be trained; the others are kept.
    """
    report = report or Report()
    _check(request)
    lessons.check_architectures(request.architectures, request.size)
    report.say(f"zoo: reading {request.images}")
    images = read_images(request.images, request.size, request.names, report)
    classes = _choose_classes(images, request, report)
    groups = _groups(request, classes.hub, report)
    parts = lessons.split(
        classes.labels,
        range(len(classes.hub), len(classes.hub) + len(classes.apart)),
        request.probes or _MOST_PROBES,
        request.seed,
    )
    specs = plan(classes.hub, groups, request.architectures, request.models, request.seed)
    _claim(request, classes, groups)
    _check_larger(request, specs)
    report.say(
        f"zoo: {len(classes.images.labels):,} images of {len(classes.hub)} classes"
        + (f" and of {len(classes.apart)} more that only the probes show" if classes.apart else "")
        + f"; {len(parts.lessons):,} to learn from, {len(parts.validation):,} to validate with, "
        f"{len(parts.queries):,} queries, {len(parts.probes):,} probes"
    )
    _train_all(request, specs, classes, parts, report, workers, gpus_per_model, ray_address)
    _write_images(request.out, classes, parts)
    _write_facts(request, specs, classes, groups)
    mean = np.mean([_entry(request.out, spec)["accuracy"] for spec in specs])
    out = request.out
    report.say(
        f"zoo: {len(specs)} models, {sum(len(spec.classes) for spec in specs)} logits, mean accuracy {mean:.0%}, in "
        f"{out}\n"
        f"  serve it:    probelog-index hub {out / 'hub'}\n"
        f"  index it:    probelog-index full, with probes = {out / 'probes.parquet'}, probe_count = "
        f"{len(parts.probes)}, background = {out / 'concepts.txt'}\n"
        f"  measure it:  probelog-index evaluate --index STORE --truth {out / 'truth.json'}"
    )


def _check(request: Request) -> None:
    if request.models < 1:
        raise UsageError(f"--models {request.models}: a zoo needs one model at the least")
    if request.epochs is not None and request.epochs < 1:
        raise UsageError(f"--epochs {request.epochs}: one pass over the images at the least")
    if request.probes is not None and request.probes < 1:
        raise UsageError(f"--probes {request.probes}: one probe at the least")
    if request.probe_classes is not None and request.probe_classes < 0:
        raise UsageError(f"--probe-classes {request.probe_classes}: 0 or more")
    check_folder(request.out, _SETTINGS, request.size, request.architectures)


def check_folder(out: Path, settings: str, size: int, architectures: Sequence[str]) -> None:
    """Refuse what no zoo and no forest can be made with; ``settings`` is the file by which ``out`` is known as one."""
    if not 16 <= size <= MAX_SIZE:
        raise UsageError(f"--size {size}: 16 to {MAX_SIZE} pixels")
    if not architectures or len(set(architectures)) < len(architectures):
        raise UsageError("--architectures needs at least one name, and each only once")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / settings).is_file():
        kind = Path(settings).stem
        raise UsageError(f"{out} is not empty and not a {kind}: name a new folder")


def _choose_classes(images: LabelledImages, request: Request, report: Report) -> _Classes:
    """Leave out classes with too few images, and set some apart for the probes."""
    if images.left_out:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in images.left_out.most_common())
        report.say(f"zoo: {images.left_out.total():,} images or files left out ({reasons})")
        for example in images.examples[:5]:
            report.say(f"  {example}")
    counts = np.bincount(images.labels, minlength=len(images.names))
    rare = [number for number, count in enumerate(counts) if count < FEWEST_IMAGES]
    able = [number for number, count in enumerate(counts) if count >= FEWEST_IMAGES]
    listed = ", ".join(f"{images.names[number][0]!r} ({counts[number]})" for number in rare[:10])
    if len(images.names) < 2:
        raise UsageError(f"{request.images} holds images of one class only: a classifier needs two or more")
    if len(able) < 2:
        raise UsageError(
            f"{request.images}: too few images per class: two classes with {FEWEST_IMAGES} usable images each are "
            f"the least; there are {listed}"
        )
    if rare:
        report.say(f"zoo: {len(rare)} classes with fewer than {FEWEST_IMAGES} images left out: {listed}")
    apart = request.probe_classes
    if apart is None:
        apart = len(able) // 5 if len(able) >= _MANY_CLASSES else 0
    if len(able) - apart < 2:
        raise UsageError(
            f"--probe-classes {apart} leaves {len(able) - apart} of {len(able)} classes to the models"
        )
    dealt = [able[int(i)] for i in np.random.default_rng((request.seed, 15)).permutation(len(able))]
    hub, other = sorted(dealt[apart:]), sorted(dealt[:apart])
    number_of = np.full(len(images.names), -1)
    number_of[[*hub, *other]] = np.arange(len(able))
    return _Classes(
        images,
        number_of[images.labels],
        [images.names[number] for number in hub],
        [images.names[number] for number in other],
    )


def _groups(request: Request, names: Sequence[Sequence[str]], report: Report) -> dict[str, tuple[int, ...]]:
    if request.groups is not None:
        return read_groups(request.groups, names)
    groups = last_word_groups(names)
    if groups:
        some = ", ".join(list(groups)[:8])
        report.say(f"zoo: {len(groups)} superclasses from last words of class names: {some}")
    else:
        report.say("zoo: no superclass heads: class names share no last word, and there is no --groups file")
    return groups


def _claim(request: Request, classes: _Classes, groups: Groups) -> None:
    """Write down what is made here, or refuse where it is something else."""
    settings = {
        "format": _FORMAT,
        "images": classes.images.digest(),
        "seed": request.seed,
        "size": request.size,
        "epochs": request.epochs,
        "architectures": list(request.architectures),
        "groups": {name: list(members) for name, members in groups.items()},
        "classes": [names[0] for names in classes.hub],
        "probe_classes": [names[0] for names in classes.apart],
        "probes": request.probes,
    }
    claim(request.out / _SETTINGS, settings, "only --models may change")


def claim(file: Path, settings: Mapping[str, Any], free: str = "") -> None:
    """Write down what is made beside ``file``, or refuse where that is something else; ``free`` says what may change."""
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = {}
        other = [
            key
            for key, value in settings.items()
            if not isinstance(content, dict) or content.get(key) != value
        ]
        if other:
            raise UsageError(
                f"{file.parent} holds a {file.stem} of other settings ({', '.join(other)}): name a new folder, or ask "
                f"for what is there{f' ({free})' if free else ''}"
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _check_larger(request: Request, specs: Sequence[Spec]) -> None:
    planned = {_entry_file(request.out, spec).name for spec in specs}
    more = [file for file in (request.out / "entries").glob("*.json") if file.name not in planned]
    if more:
        raise UsageError(
            f"{request.out} holds {len(more)} models more than --models {request.models}: name a new folder, or ask "
            "for as many as are there"
        )


def _train_all(
    request: Request, specs: Sequence[Spec], classes: _Classes, parts: Split, report: Report, workers: int | None,
    gpus: float, address: str | None,
) -> None:  # fmt: skip
    out = request.out
    shutil.rmtree(out / _UNFINISHED, ignore_errors=True)
    todo = [spec for spec in specs if not _is_finished(out, spec)]
    counted = report.counter("zoo", len(specs), "models", len(specs) - len(todo))
    by_repo = {spec.repo: spec for spec in specs}
    lacking = {spec.repo for spec in todo if spec.kind != "copy"}
    problems: list[str] = []
    if lacking:
        with session(address, workers):
            import ray

            if gpus > 0 and not ray.cluster_resources().get("GPU"):
                raise UsageError(
                    "--gpus-per-model: there is no GPU in this Ray; leave it out to train on CPUs"
                )
            held = ray.put(Material(classes.images.pixels, classes.labels, parts.lessons, parts.validation))
            device = "cuda" if gpus > 0 else "cpu"
            arguments: dict[str, list[Any]] = {}
            parents: dict[str, str] = {}
            for repo in by_repo:
                if repo in lacking:
                    spec = by_repo[repo]
                    ready = None
                    if spec.parent in lacking:
                        parents[repo] = spec.parent
                    elif spec.parent is not None:
                        ready = ray.put(_files(out / "hub" / spec.parent))
                    arguments[repo] = [spec, held, request.epochs, device, ready]
            at_once = workers or worker_count(1, gpus)
            for end in run_families(
                _make, arguments, parents, at_once=at_once, cpus=1, gpus=gpus, tick=counted.show
            ):
                if end.error is None:
                    _keep(out, by_repo[end.name], end.result)
                    counted.add()
                else:
                    problems.append(f"{end.name}: {end.error}")
                    counted.add(reason="training failed")
    for spec in todo:
        if spec.kind == "copy" and spec.parent is not None and _is_finished(out, by_repo[spec.parent]):
            entry = _entry(out, by_repo[spec.parent])
            _keep(
                out, spec, Trained(_files(out / "hub" / spec.parent), entry["accuracy"], entry["parameters"])
            )
            counted.add()
    counted.show(final=True)
    shutil.rmtree(out / _UNFINISHED, ignore_errors=True)
    if problems:
        raise ProbeLogError(
            "\n".join(
                [
                    f"{len(problems)} models were not trained; the same command tries them again",
                    *problems[:10],
                ]
            )
        )


def _make(
    spec: Spec,
    material: Material,
    epochs: int | None,
    device: str,
    ready: Mapping[str, bytes] | None,
    parent: Trained | None,
) -> Trained:
    """One Ray task: train a model, from its parent's files where it has one."""
    return lessons.train(spec, material, ready if parent is None else parent.files, epochs, device)


def _entry_file(out: Path, spec: Spec) -> Path:
    return out / "entries" / (spec.repo.replace("/", "--") + ".json")


def _entry(out: Path, spec: Spec) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(_entry_file(out, spec).read_text(encoding="utf-8"))
    return entry


def _is_finished(out: Path, spec: Spec) -> bool:
    return _entry_file(out, spec).is_file() and (out / "hub" / spec.repo / "config.json").is_file()


def _keep(out: Path, spec: Spec, trained: Trained) -> None:
    """Put a finished model in its place: its folder at one stroke, its entry last."""
    scratch = out / _UNFINISHED / spec.repo
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, data in trained.files.items():
        (scratch / name).write_bytes(data)
    folder = out / "hub" / spec.repo
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    file = _entry_file(out, spec)
    file.parent.mkdir(exist_ok=True)
    entry = {
        "repo": spec.repo,
        "kind": spec.kind,
        "architecture": spec.architecture,
        "accuracy": round(trained.accuracy, 4),
        "parameters": trained.parameters,
    }
    write_json(file, entry)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _write_images(out: Path, classes: _Classes, parts: Split) -> None:
    """Write queries and probes in the Hub's image format, each image as it is in the source."""
    names = [*classes.hub, *classes.apart]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = classes.images.encoded([*parts.queries.tolist(), *parts.probes.tolist()])
    for file, chosen, indices in (
        ("queries.parquet", parts.queries, images[: len(parts.queries)]),
        ("probes.parquet", parts.probes, images[len(parts.queries) :]),
    ):
        numbers = classes.labels[chosen]
        rows = [{"bytes": data, "path": f"{int(i):07d}"} for i, data in zip(chosen, indices, strict=True)]
        columns: dict[str, Any] = {"image": pa.array(rows, kind)}
        if file == "queries.parquet":
            columns["class"] = pa.array(numbers, pa.int32())
        else:
            columns["shows"] = pa.array([names[number][0] for number in numbers])
        scratch = out / (file + ".part")
        pq.write_table(pa.table(columns), scratch, compression="none")
        os.replace(scratch, out / file)


def _write_facts(request: Request, specs: Sequence[Spec], classes: _Classes, groups: Groups) -> None:
    out = request.out
    rng = np.random.default_rng((request.seed, 16))
    library = {spec.repo: lessons.architecture(spec.architecture).library for spec in specs}
    rows = [networks.listing_row(repo, out / "hub" / repo, library[repo], rng) for repo in library]
    write_json(out / "hub" / "hub.json", rows)
    facts = truth(classes.hub, groups, specs, {spec.repo: _entry(out, spec)["accuracy"] for spec in specs})
    background = dict.fromkeys([*facts["concepts"], *(names[0] for names in classes.apart)])
    _write_text(out / "concepts.txt", "\n".join(background) + "\n")
    write_json(out / "truth.json", facts)


def truth(
    names: Sequence[Sequence[str]], groups: Groups, specs: Sequence[Spec], accuracies: Mapping[str, float]
) -> dict[str, Any]:
    """What every logit stands for, as `pipelines.evaluate.Truth` reads it.

    Classes that are called the same make one concept together: either of them answers it.
    """
    concepts: dict[str, list[int]] = {}
    for number, synonyms in enumerate(names):
        concepts.setdefault(synonyms[0], []).append(number)
    for group, members in groups.items():
        concepts.setdefault(group, list(members))
    return {
        "classes": [list(synonyms) for synonyms in names],
        "concepts": concepts,
        "models": {
            spec.repo: {
                "logits": [list(members) for members in spec.classes],
                "labels": list(spec.names),
                "accuracy": accuracies[spec.repo],
                "kind": spec.kind,
                "parent": spec.parent,
                "architecture": spec.architecture,
            }
            for spec in specs
        },
    }


def write_json(file: Path, value: object) -> None:
    """Write a file at one stroke."""
    _write_text(file, json.dumps(value, indent=1) + "\n")


def _write_text(file: Path, text: str) -> None:
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
