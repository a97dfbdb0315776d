"""Builds the whole world into one folder: hub, truth, encoder, probes, names and a README."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.demo.builder import classifiers, encoder, generators, hostile, icons, vocabulary
from pipelines.demo.builder.classifiers import Spec, TrainedClassifier
from pipelines.demo.builder.icons import DrawnConcept
from pipelines.demo.builder.render import choose_glyphs, render_many
from pipelines.zoo import networks
from probelog.errors import UsageError

PROBES = 2000
_KNOWN_SHARE = 0.4
_PALETTE = 24

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Things:
    """What there is to draw: the concepts, and things beside them that are no concept."""

    concepts: list[DrawnConcept]
    others: list[DrawnConcept]


def things() -> Things:
    """Every concept that two designers or more draw, and the other things."""
    return Things(icons.drawn(vocabulary.concepts(), 2), icons.drawn(vocabulary.others(), 1))


def probe_glyphs(all_things: Things, count: int, seed: int) -> list[tuple[str, icons.Glyph]]:
    """Which drawings the probes show: (name, glyph), a share of them of things that classifiers were taught.

    The rest are concepts that no classifier knows and things beside the concepts, as COCO is to ImageNet.
    """
    rng = np.random.default_rng((seed, 5))
    known = set(classifiers.known_concepts(all_things.concepts))
    taught = [drawn for i, drawn in enumerate(all_things.concepts) if i in known]
    beside = [drawn for i, drawn in enumerate(all_things.concepts) if i not in known] + all_things.others
    chosen: list[tuple[str, icons.Glyph]] = []
    for group, size in ((taught, round(count * _KNOWN_SHARE)), (beside, count - round(count * _KNOWN_SHARE))):
        turns = [group[int(i)] for _ in range(size // len(group) + 1) for i in rng.permutation(len(group))]
        chosen += [(drawn.name, choose_glyphs(drawn, icons.DESIGNERS, 1, rng)[0]) for drawn in turns[:size]]
    return [chosen[int(i)] for i in rng.permutation(len(chosen))]


def probe_table(all_things: Things, count: int, seed: int) -> pa.Table:
    """The probes in the Hub's image format, with what each shows; PNG with a palette, to be small."""
    chosen = probe_glyphs(all_things, count, seed)
    pictures = render_many([glyph for _, glyph in chosen], seed, first=1_000_000, noise=False)
    rows = []
    for i, picture in enumerate(pictures):
        sink = io.BytesIO()
        Image.fromarray(picture).quantize(_PALETTE).save(sink, "PNG", optimize=True)
        rows.append({"bytes": sink.getvalue(), "path": f"{i:05d}.png"})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(rows, image), "shows": pa.array([name for name, _ in chosen])})


def _train_encoder(all_things: Things, seed: int, quick: bool, device: str, folder: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    effort = encoder.QUICK if quick else encoder.FULL
    model, tokenizer = encoder.train(
        all_things.concepts,
        all_things.others,
        effort=effort,
        seed=seed,
        device=device,
        say=lambda line: print(line, flush=True),
    )
    encoder.save(model, tokenizer, folder)
    seen = [designer for designer in icons.DESIGNERS if designer != encoder.HELD_OUT]
    return {
        name: encoder.zero_shot(
            model, tokenizer, all_things.concepts, designers=designers, per_class=4, seed=seed
        )
        for name, designers in (("held_out", [encoder.HELD_OUT]), ("seen", seen))
    }


def _train_classifiers(
    all_things: Things, specs: Sequence[Spec], quick: bool, hub: Path, bases: Path, device: str, seed: int,
    submit: Callable[..., Any], report: Callable[[TrainedClassifier], None],
) -> None:  # fmt: skip
    """Train the bases, then what starts from them, then the children of the latter."""
    base_effort = classifiers.QUICK if quick else classifiers.BASE
    effort = classifiers.QUICK if quick else classifiers.FULL
    needed = dict.fromkeys(spec.architecture for spec in specs)
    waves: list[list[Any]] = [
        [
            (
                classifiers.base(name, all_things.concepts, seed),
                all_things.concepts,
                base_effort,
                bases,
                None,
                device,
            )
            for name in needed
        ],
        [
            (spec, all_things.concepts, effort, hub, bases / "base" / spec.architecture, device)
            for spec in specs
            if spec.parent is None
        ],
        [
            (spec, all_things.concepts, effort, hub, hub / spec.parent, device)
            for spec in specs
            if spec.kind == "child" and spec.parent is not None
        ],
    ]
    for wave in waves:
        jobs: list[Future[TrainedClassifier]] = [submit(classifiers.make, *arguments) for arguments in wave]
        for job in as_completed(jobs):
            report(job.result())


Result = TypeVar("Result")


def _at_once(function: Callable[..., Result], *arguments: object) -> Future[Result]:
    """Run a job here and now, in the form in which a pool of processes would return it."""
    future: Future[Result] = Future()
    future.set_result(function(*arguments))
    return future


def build(
    out: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    workers: int = 1,
    encoder_from: Path | None = None,
    say: Say = print,
) -> None:
    """Make the world in ``out``, which must be empty or absent.

    ``quick`` makes a toy of three barely trained models. ``encoder_from`` takes over the encoder of a world made
    earlier instead of training it again (its accuracy is then read from that world's ``figures.json``).

    Raises:
        UsageError: the folder is not empty, or the icon fonts are missing.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: name a new folder, or remove it first")
    started = time.monotonic()
    all_things = things()
    if quick:
        all_things = Things(
            [drawn for drawn in all_things.concepts if len(drawn.drawings) == 4][:12], all_things.others[:12]
        )
    specs = classifiers.plan(all_things.concepts, seed, quick=quick)
    say(
        f"{len(all_things.concepts)} concepts, {len(all_things.others)} other things, {len(specs)} classifiers"
    )
    out.mkdir(parents=True, exist_ok=True)
    hub = out / "hub"
    table = probe_table(all_things, 40 if quick else PROBES, seed)
    pq.write_table(table, out / "probes.parquet", compression="none")

    outcomes: dict[str, TrainedClassifier] = {}

    def report(outcome: TrainedClassifier) -> None:
        outcomes[outcome.repo] = outcome
        minutes = (time.monotonic() - started) / 60
        say(
            f"{outcome.repo}: {outcome.accuracy:.0%}, "
            f"{outcome.parameters / 1e3:.0f}k parameters, {minutes:.1f} min"
        )

    if encoder_from is not None:
        shutil.copytree(encoder_from / "encoder", out / "encoder")
        figures: dict[str, float] = json.loads((encoder_from / "figures.json").read_text())
    with tempfile.TemporaryDirectory() as bases, contextlib.ExitStack() as stack:
        submit: Callable[..., Any] = _at_once
        if workers > 1:
            submit = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn"))).submit
        if encoder_from is None:
            towers = submit(_train_encoder, all_things, seed, quick, device, out / "encoder")
        _train_classifiers(all_things, specs, quick, hub, Path(bases), device, seed, submit, report)
        if encoder_from is None:
            figures = towers.result()
    for spec in specs:
        if spec.kind == "copy":
            assert spec.parent is not None
            shutil.copytree(hub / spec.parent, hub / spec.repo)
            report(replace(outcomes[spec.parent], repo=spec.repo))
    say(
        f"encoder: {figures['held_out']:.1%} zero-shot on the held-out designer, {figures['seen']:.1%} on the others"
    )
    _write_json(out / "figures.json", figures)
    write_listing(out, specs, hostile.write(hub), seed)
    if not quick:
        generators.build(out, seed, say)
    _write_json(out / "truth.json", truth(all_things.concepts, specs, outcomes))
    (out / "concepts.txt").write_text("\n".join(background(all_things.concepts)) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(all_things, specs, outcomes, figures, seed), encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out}: {size / 1e6:.1f} MB, {(time.monotonic() - started) / 60:.1f} min")


def background(concepts: Sequence[DrawnConcept]) -> list[str]:
    """Names for the background: every concept's, known to a classifier or not, and the superclasses'."""
    kinds = {kind for drawn in concepts for kind in drawn.concept.superclasses}
    return sorted({drawn.name for drawn in concepts} | kinds)


def truth(
    concepts: Sequence[DrawnConcept], specs: Sequence[Spec], outcomes: dict[str, TrainedClassifier]
) -> dict[str, Any]:
    """Who knows what. Concepts that no logit stands for are left out: nobody could find them.

    A logit is relevant to a single concept if its class set contains it, to a superclass if its set lies within.
    """
    sets = [set(members) for spec in specs for members in spec.classes]
    names: dict[str, list[int]] = {}
    for i, drawn in enumerate(concepts):
        if any(i in members for members in sets):
            names[drawn.name] = [i]
    every = range(len(concepts))
    for kind, members in classifiers.superclasses(concepts, every).items():
        if kind not in names and any(known <= set(members) for known in sets):
            names[kind] = list(members)
    return {
        "classes": [[drawn.name, *drawn.concept.synonyms] for drawn in concepts],
        "concepts": names,
        "models": {spec.repo: classifiers.describe(spec, outcomes[spec.repo]) for spec in specs},
    }


def write_listing(out: Path, specs: Sequence[Spec], broken: Sequence[str], seed: int) -> None:
    """Write ``hub/hub.json``: what the Hub's listing says about every repository."""
    rng = np.random.default_rng((seed, 6))
    libraries = {spec.repo: networks.ARCHITECTURES[spec.architecture].library for spec in specs}
    rows = []
    for number, repo in enumerate((*libraries, *broken)):
        row = networks.listing_row(repo, out / "hub" / repo, libraries.get(repo, "transformers"), rng)
        # Children come behind their parents.
        day = dt.datetime(2024, 1, 1, 8, tzinfo=dt.UTC) + dt.timedelta(days=9 * number)
        created = {"createdAt": day.strftime("%Y-%m-%dT%H:%M:%S.000Z")}
        rows.append(row | created | hostile.hub_row(repo))
    _write_json(out / "hub" / "hub.json", rows)


def readme(
    all_things: Things,
    specs: Sequence[Spec],
    outcomes: dict[str, TrainedClassifier],
    figures: dict[str, float],
    seed: int,
) -> str:
    """The README that goes with the world: how it was made, what is in it, whose drawings it shows."""
    known = len(classifiers.known_concepts(all_things.concepts))
    three = sum(len(drawn.drawings) >= 3 for drawn in all_things.concepts)
    lines = [
        f"| `{spec.repo}` | {spec.kind} | {spec.architecture} | {len(spec.classes)} | {spec.dtype} "
        f"| {outcomes[spec.repo].accuracy:.0%} |"
        for spec in specs
    ]
    models = "\n".join(lines)
    return f"""# The demo's world

A small hub of real image classifiers, made by `python -m pipelines.demo.builder --seed {seed}` from icon fonts: nothing
here was downloaded from a hub, and nothing is copied from one. The same seed gives the same bytes on the same
machine; on two shared CPU cores it takes 20 to 30 minutes.

- `hub/`: {len(specs)} trained classifiers of 64-pixel pictures as they would lie on the Hub, {len(hostile.REPOSITORIES)} broken or
  hostile repositories (`unsafe/`, `closed/`), and the listing `hub.json`. Nothing in them is to be trusted: that is
  their purpose. The pickle among them would create a file if it were loaded; it never is.
- `truth.json`: what every logit stands for, for measuring searches; not used to build an index.
- `hub/` also holds {generators.COUNT} tiny generators, which make pictures of {generators.SIZE} pixels; `generators.json`: what each of them makes.
- `probes.parquet`: {PROBES} pictures, {_KNOWN_SHARE:.0%} of them of things that classifiers were taught, the rest of other
  things: {len(all_things.concepts) - known} concepts that no classifier knows and {len(all_things.others)} things that are no concept at all.
- `encoder/`: the stand-in for CLIP, a vision-text dual encoder. Of one designer it saw no drawing of any concept:
  on those it names {figures["held_out"]:.1%} rightly among {len(all_things.concepts)} names ({figures["seen"]:.1%} on new pictures by the others).
- `concepts.txt`: names for the background.

{len(all_things.concepts)} concepts are drawn by two designers or more ({three} by three or more), {known} of them are taught to
classifiers. Every classifier learns some of them from three of the four designers; a picture is one glyph in random
colours, size, place and rotation on a cluttered ground.

| repository | kind | architecture | logits | stored as | accuracy |
|---|---|---|---|---|---|
{models}

Accuracy: on new pictures of drawings by the classifier's own designers, with the weights as stored (for `binary`
and `multilabel`: the mean of hit and rejection rates).

## Whose drawings

Only rendered pixels are here, no fonts. The drawings come from Material Design Icons (Apache-2.0), Font Awesome 6
Free (icons CC-BY-4.0, fonts SIL OFL 1.1, https://fontawesome.com), Phosphor Icons (MIT) and Remix Icon
(Apache-2.0), as QtAwesome ships them.
"""


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
