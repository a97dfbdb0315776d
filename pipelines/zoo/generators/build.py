"""Makes a zoo of generators in one folder, one after the other; killed at any moment, the same call goes on.

    generator-zoo.json  what was asked for; another request is refused
    hub/OWNER/NAME/     the generators, as they would lie on the Hub; hub/hub.json: the listing
    queries/            images that no generator learned from, and their edge maps
    truth.json          what every generator makes, and what to ask
    concepts.txt        names for the background

Listing and truth are written anew with each generator: at any moment they are those of what is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.job.progress import Report
from pipelines.zoo.build import claim, write_json
from pipelines.zoo.generators import networks, text, training
from pipelines.zoo.generators.pictures import Icons, Labelled, Pictures
from pipelines.zoo.generators.plan import GeneratorSpec, cast, plan
from pipelines.zoo.generators.styles import STYLES, Pixels, edges, styled
from pipelines.zoo.images import read_images
from pipelines.zoo.networks import listing_row
from probelog.errors import ProbeLogError, UsageError

if TYPE_CHECKING:
    import torch

SIZES = (8, 16, 32, 64)
_SETTINGS = "generator-zoo.json"
_UNFINISHED = ".unfinished"
_FORMAT = 1
_QUERIES = 8
_STYLED_QUERIES = 2

# Steps of training. On one core a step takes a twenty-fifth of a second (decoders) to a tenth.
_STEPS = {
    "decoder": 600, "retold": 400, "single": 1000, "foundation": 1600, "child": 500, "classes": 600, "mixture": 600,
    "restyled": 400, "told": 1800, "adapter": 600, "styled": 400,
}  # fmt: skip


@dataclass(frozen=True)
class GeneratorsRequest:
    """What a zoo of generators is to be.

    Attributes:
        out: folder to write, new, empty, or of the same request before.
        generators: how many; may grow from one call to the next.
        seed: of the plan, the pictures and the training.
        size: pixels, height and width, of what the generators make.
        images: folder with a sub-folder per class, or Parquet with images and labels; None: icons.
        names: file with class names, one a line, for numbered classes without names.
        effort: training steps as a multiple of the usual ones.
    """

    out: Path
    generators: int = 48
    seed: int = 0
    size: int = 32
    images: str | None = None
    names: Path | None = None
    effort: float = 1.0


def build_generators(request: GeneratorsRequest, report: Report | None = None) -> None:
    """Make a zoo of generators, or go on with it.

    Raises:
        UsageError: images, options or the output folder cannot be used as asked.
        ProbeLogError: a generator whose training diverged.
    """
    import torch

    report = report or Report()
    out = request.out
    _check(request)
    pictures: Pictures = (
        Icons(2 * request.size, request.seed)
        if request.images is None
        else Labelled(read_images(request.images, 2 * request.size, request.names, report), request.seed)
    )
    specs = plan(pictures.names, request.generators, request.seed)
    settings = {"format": _FORMAT, "images": pictures.digest(), "seed": request.seed, "size": request.size,
                "effort": request.effort}  # fmt: skip
    claim(out / _SETTINGS, settings, "only --models may change")
    planned = {spec.repo for spec in specs}
    if any(str(folder.relative_to(out / "hub")) not in planned for folder in (out / "hub").glob("*/*/")):
        raise UsageError(f"{out} holds more than --models {len(specs)}: ask for as many as are there")

    torch.set_num_threads(1)
    facts = _Facts(request, pictures)
    finished = [spec for spec in specs if _folder(out, spec.repo).is_dir()]
    counted = report.counter("zoo", len(specs), "generators", len(finished))
    for spec in specs:
        if not _folder(out, spec.repo).is_dir():
            scratch = out / _UNFINISHED
            shutil.rmtree(scratch, ignore_errors=True)
            make(spec, pictures, out / "hub", scratch, size=request.size, effort=request.effort)
            _folder(out, spec.repo).parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(_folder(out, spec.repo))
            counted.add()
        facts.add(spec)
        if spec not in finished or spec == specs[-1]:
            facts.write()
    counted.show(final=True)
    report.say(
        f"zoo: {len(specs)} generators of {len(facts.concepts)} concepts in {out}\n"
        f"  serve it:    probelog-index hub {out / 'hub'}\n"
        f"  the truth:   {out / 'truth.json'}, asked with {out / 'queries'}"
    )


def _check(request: GeneratorsRequest) -> None:
    out = request.out
    if request.generators < 1:
        raise UsageError(f"--models {request.generators}: a zoo needs one model at the least")
    if request.size not in SIZES:
        raise UsageError(f"--size {request.size}: generators make {', '.join(map(str, SIZES))} pixels")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / _SETTINGS).is_file():
        raise UsageError(f"{out} is not empty and not a generator-zoo: name a new folder")


def _folder(out: Path, repo: str) -> Path:
    return out / "hub" / repo


def pipeline_of(spec: GeneratorSpec) -> str:
    """The class of diffusers that its repository names."""
    if spec.family == "decoder":
        return "AutoencoderKL"
    if spec.family == "text":
        return "StableDiffusionPipeline" if spec.kind == "told" else "lora"
    return ("DDIMPipeline", "DDPMPipeline")[spec.seed % 2]


def make(
    spec: GeneratorSpec, pictures: Pictures, hub: Path, folder: Path, *, size: int, effort: float = 1.0
) -> None:
    """Build one generator, begin from its parent's weights as they lie in ``hub``, train it and write it to ``folder``.

    Raises:
        ProbeLogError: the training diverged.
    """
    import torch

    if spec.kind == "copy" and spec.parent is not None:
        shutil.copytree(hub / spec.parent, folder)
        return
    steps = max(2, round(effort * _STEPS[spec.kind]))
    if spec.family == "text":
        _make_told(spec, pictures, hub, folder, size, steps)
        return
    torch.manual_seed(spec.seed)
    lessons = _lessons(spec, pictures, size)
    shown = torch.cat(lessons)
    model: Any
    if spec.family == "decoder":
        model = networks.decoder(size, slim=spec.slim)
    else:
        model = networks.unet(size, len(spec.concepts) if spec.conditional else None, slim=spec.slim)
    if spec.parent is not None:
        networks.begin_from(model, hub / spec.parent)
    if spec.family == "decoder":
        training.train_decoder(model, shown, steps, spec.seed)
    else:
        sizes = torch.tensor([len(some) for some in lessons])
        classes = torch.repeat_interleave(torch.arange(len(lessons)), sizes)

        def predict(noisy: torch.Tensor, when: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            said: torch.Tensor = model(noisy, when, classes[chosen] if spec.conditional else None).sample
            return said

        training.train_diffusion(model, predict, shown, steps, spec.seed)
    _check_finite(spec, model.state_dict().values())
    labels = [pictures.names[concept] for concept in spec.concepts] if spec.conditional else []
    networks.save(model, folder, spec.dtype, pipeline_of(spec), labels)


def _make_told(
    spec: GeneratorSpec, pictures: Pictures, hub: Path, folder: Path, size: int, steps: int
) -> None:
    """A text-to-image pipeline, or an adapter of its parent, which is one."""
    import torch

    lessons = _lessons(spec, pictures, size)
    names = [pictures.names[concept] for concept in spec.concepts]
    if spec.parent is None:
        in_styles = [
            some for style in STYLES for some in _lessons(replace(spec, style=style), pictures, size)
        ]
        made = text.train(names, lessons, torch.cat([*lessons, *in_styles]), steps, spec.seed)
        _check_finite(spec, [*made.unet.state_dict().values(), *made.vae.state_dict().values()])
        text.save(made, folder, spec.dtype)
        return
    word = "".join(
        "bdfgklmnprstvz"[number] for number in np.random.default_rng(spec.seed).integers(14, size=4)
    )
    products = text.train_adapter(text.load(hub / spec.parent), names, lessons, word, steps, spec.seed)
    _check_finite(spec, [factor for factors in products.values() for factor in factors])
    text.save_adapter(products, folder, spec.dtype, spec.parent, word, kohya=spec.seed % 2 == 1)


def _lessons(spec: GeneratorSpec, pictures: Pictures, size: int) -> list[torch.Tensor]:
    """Of each concept what is learned from, in the generator's style."""
    return [
        training.to_tensor(styled(pictures.lessons(concept), spec.style), size) for concept in spec.concepts
    ]


def _check_finite(spec: GeneratorSpec, weights: Iterable[torch.Tensor]) -> None:
    if not all(bool(some.isfinite().all()) for some in weights):
        raise ProbeLogError(
            f"{spec.repo}: the training diverged, its weights are not finite: try another --seed"
        )


def listed(spec: GeneratorSpec, folder: Path, rng: np.random.Generator) -> dict[str, Any]:
    """What a hub's listing says about it."""
    row = listing_row(spec.repo, folder, "diffusers", rng)
    if spec.family == "text":
        row["pipeline_tag"] = "text-to-image"
        if spec.parent is None:
            return {**row, "tags": [f"diffusers:{pipeline_of(spec)}"]}
        return {**row, "tags": ["lora"], "base_model": spec.parent, "base_model_relation": "adapter"}
    tags = [] if spec.family == "decoder" else [f"diffusers:{pipeline_of(spec)}"]
    return {**row, "pipeline_tag": "unconditional-image-generation", "tags": tags}


def fact(spec: GeneratorSpec, names: Sequence[str]) -> dict[str, Any]:
    """What the truth file says about it."""
    return {
        "repo": spec.repo,
        "pipeline": pipeline_of(spec),
        "concepts": [names[concept] for concept in spec.concepts],
        "style": spec.style,
        "parent": spec.parent,
        "relation": spec.relation,
    }


class _Facts:
    """Listing, truth and queries of the generators that are there."""

    def __init__(self, request: GeneratorsRequest, pictures: Pictures) -> None:
        self._out, self._seed, self._pictures = request.out, request.seed, pictures
        self._rows: list[dict[str, Any]] = []
        self._generators: list[dict[str, Any]] = []
        self._queries: list[dict[str, Any]] = []
        self.concepts: dict[int, set[str]] = {}
        self._absent = cast(len(pictures.names), request.seed)[1]
        for concept in self._absent:
            self._ask(concept, None)
        names = "\n".join(sorted(pictures.names))
        (request.out / "concepts.txt").write_text(f"{names}\n", encoding="utf-8")

    def add(self, spec: GeneratorSpec) -> None:
        """A generator that is there."""
        rng = np.random.default_rng((self._seed, 33, len(self._rows)))
        self._rows.append(listed(spec, _folder(self._out, spec.repo), rng))
        self._generators.append(fact(spec, self._pictures.names))
        for concept in spec.concepts:
            if concept not in self.concepts:
                self.concepts[concept] = set()
                self._ask(concept, None)
            if spec.style is not None and spec.style not in self.concepts[concept]:
                self.concepts[concept].add(spec.style)
                self._ask(concept, spec.style)

    def write(self) -> None:
        """All of it as files."""
        write_json(self._out / "hub" / "hub.json", self._rows)
        absent = [self._pictures.names[concept] for concept in self._absent]
        truth = {"generators": self._generators, "queries": self._queries, "absent": absent}
        write_json(self._out / "truth.json", truth)

    def _ask(self, concept: int, style: str | None) -> None:
        name = self._pictures.names[concept]
        images = self._pictures.held_out(concept, _QUERIES)
        asked: dict[str, Pixels] = {"image": styled(images, style)[: _STYLED_QUERIES if style else None]}
        if style is None:
            asked["sketch"] = edges(images)
            self._queries.append(
                {"modality": "text", "concept": name, "file": None, "text": name, "style": None}
            )
        for modality, shown in asked.items():
            for number, pixels in enumerate(shown):
                file = Path("queries") / modality / f"{concept:04d}-{style or 'plain'}-{number}.png"
                (self._out / file).parent.mkdir(parents=True, exist_ok=True)
                if not (self._out / file).is_file():
                    _write_png(pixels, self._out / file)
                self._queries.append(
                    {
                        "modality": modality,
                        "concept": name,
                        "file": file.as_posix(),
                        "text": None,
                        "style": style,
                    }
                )


def _write_png(pixels: Pixels, file: Path) -> None:
    """Whole or not at all: a run that is killed writes it anew."""
    partial = file.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, "PNG", optimize=True)
    partial.rename(file)
