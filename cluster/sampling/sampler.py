"""The sampling actor: downloads a generator, has it sampled in a confined process, embeds and keeps what it made.

Download, embed and write: this process. Load and sample: processes without a token and without a network. Pictures are
embedded here, never in the model's process, so that no model decides how it is found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster.probing.coordinator import CoordinatorHandle
from cluster.probing.results import ItemReport
from cluster.probing.worker import (
    NODE_SHARE,
    PROCESS_SHARE,
    PROCESSES,
    Clock,
    Item,
    ItemWorker,
    Outcome,
    Workers,
    WorkerSpec,
    workers,
)
from cluster.sampling.bases import Base, Bases, base_of
from probelog.encoders.torch_encoder import Encoder, load_encoder
from probelog.errors import ItemFailure, ProbeLogError
from probelog.generators.layout import read_layout
from probelog.generators.parts.decoders import DECODERS
from probelog.hub.download import Downloaded
from probelog.hub.listing import look_up
from probelog.kinds.registry import GENERATOR
from probelog.models.content import content_digest
from probelog.probes.selection import thumbnail
from probelog.ranking.samples.description import Float32s
from probelog.ranking.samples.enough import batches, is_unsure
from probelog.sandbox.fork_server.client import ForkServer
from probelog.sandbox.generators import GeneratorProcess, LoadedGenerator, SampledImages, generator_server
from probelog.sandbox.spec import GeneratorSpec
from probelog.storage.encoding import short_key
from probelog.storage.ledger import ItemResult
from probelog.storage.samples import sample_rows
from probelog.storage.schemas import MOST_THUMBNAILS, SampledModel
from probelog.storage.store import Store

# Of pictures that are held at once.
_BYTES_AT_ONCE = 64 << 20
_ADAPTER = "lora"
_WITHOUT_STEPS = (*DECODERS, "gallery")
# Samples beyond the first ones are made only where the time that is left is so many times what they should take.
_PATIENCE = 2.0


@dataclass(frozen=True, kw_only=True)
class SamplerSpec(WorkerSpec):
    """What a sampling actor needs to know.

    Attributes:
        encoder: of the index, a Hub id or a folder, and
        encoder_digest: what it must be.
        samples: of each generator,
        max_samples: and of one that is unsure what it makes, by
        names: (n, d), embeddings of the background's names; None where nothing is made beyond ``samples``.
        steps: of the sampler.
        seed: of the set of samples.
        prompts: for generators that take text; none for the built-in ones.
        max_image_size: largest edge of a sample, in pixels.
    """

    encoder: str
    encoder_digest: str
    samples: int
    max_samples: int
    names: Float32s | None = field(repr=False, compare=False)
    steps: int
    seed: int
    prompts: tuple[str, ...]
    max_image_size: int


class Sampler(ItemWorker[SamplerSpec, GeneratorProcess]):
    """Samples generators."""

    kind = GENERATOR

    def __init__(self, spec: SamplerSpec, coordinator: CoordinatorHandle, identity: str) -> None:
        """``identity``: how the coordinator tells this worker from others."""
        super().__init__(spec, coordinator, identity)
        self._encoder = _encoder(spec)
        self._bases = Bases(self._own, lambda repo: look_up(self._hub, repo), self._download)

    def _processes(
        self, store: Store, scratch: Path, memory: int
    ) -> tuple[ForkServer, Sequence[GeneratorProcess]]:
        spec, settings = self._spec, self._settings
        server = generator_server(scratch, settings.preload, settings.device)
        process = GeneratorSpec(
            steps=spec.steps,
            seed=spec.seed,
            prompts=spec.prompts,
            batch_size=settings.batch_size,
            precision=settings.precision,
            max_params=spec.max_params,
            max_image_size=spec.max_image_size,
            allow_pickle=settings.allow_pickle,
            device=settings.device,
            device_share=min(1.0, settings.gpus_per_worker) * NODE_SHARE * PROCESS_SHARE,
            memory_bytes=memory,
            threads=max(1, int(settings.cpus_per_worker)),
        )
        return server, [GeneratorProcess(server, process) for _ in range(PROCESSES)]

    def _use(self, item: Item, downloaded: Downloaded, clock: Clock) -> Outcome:
        with contextlib.ExitStack() as stack:
            base: Base | None = None
            if read_layout(downloaded.folder).pipeline == _ADAPTER:
                with clock.part("download"):
                    base = stack.enter_context(self._bases.held(base_of(downloaded.folder, item.row)))
            return self._in_process(
                lambda process: self._observe(process, item, downloaded, base, clock), clock
            )

    def _observe(
        self, process: GeneratorProcess, item: Item, downloaded: Downloaded, base: Base | None, clock: Clock
    ) -> Outcome:
        row, spec = item.row, self._spec
        with clock.part("load", counts=True):
            folder = None if base is None else base.downloaded.folder
            loaded = process.load(
                downloaded.folder,
                row.repo,
                row.sha,
                clock.remaining,
                folder,
                None if base is None else base.samples.digest,
            )
            # Its process may be the model's, and say that it is another one.
            contents = [content_digest(one.folder, one.digests) for one in _downloads(downloaded, base)]
            identity = short_key(loaded.identity, *contents)
        facts = loaded.facts | {
            "seconds_load": clock.seconds["load"],
            "identity": identity,
            "base_repo": None if base is None else base.repo,
            "base_sha": None if base is None else base.sha,
        }
        with self._claimed(identity, item, clock) as claim:
            original = claim.original
            if (
                original is not None
                and (copied := self._copy(original, row, facts, downloaded.bytes)) is not None
            ):
                process.release()
                return copied, self._report(facts, downloaded.bytes, original.repo)
            # Words of its own are prompts of its own: then its base is sampled beside it.
            alone = base is not None and not facts["trigger_words"]
            samples = self._sample(process, loaded, clock, with_base=not alone)
            process.release()
            count = len(samples.features)
            base_features = samples.base_features
            if base is not None and alone:
                base_features = self._base_features(process, base, count, clock)
            model = SampledModel(
                **facts,
                repo=row.repo,
                sha=row.sha,
                samples=count,
                steps=0 if facts["pipeline"] in _WITHOUT_STEPS else spec.steps,
                encoder_digest=spec.encoder_digest,
                precision=samples.precision,
                batch_size=samples.batch_size,
                bytes=downloaded.bytes,
                seconds_download=clock.seconds["download"],
                seconds_sample=clock.seconds["sample"],
                seconds_embed=clock.seconds["embed"],
                thumbnails=samples.thumbnails,
            )
            rows = sample_rows(
                row.repo,
                row.sha,
                samples.features,
                base_features=base_features,
                prompts=samples.prompts,
                classes=samples.classes,
            )
        report = replace(self._report(facts, downloaded.bytes, None), copies_checked=claim.answered)
        return ItemResult.success(model, rows, loaded.weights), report

    def _base_features(self, process: GeneratorProcess, base: Base, count: int, clock: Clock) -> Float32s:
        """Features of the first samples of an adapter's base, made by itself where no adapter before needed them.

        Raises:
            ItemFailure: the base cannot be loaded or sampled; the reason is the adapter's.
        """

        def make(numbers: range) -> tuple[Float32s, str]:
            try:
                with clock.part("load", counts=True):
                    loaded = process.load(base.downloaded.folder, base.repo, base.sha, clock.remaining)
                samples = _Samples()
                self._add(samples, process, loaded, numbers, (), clock, with_base=False)
            except ItemFailure as failure:
                raise ItemFailure(failure.reason, f"base {base.repo}: {failure.detail}") from failure
            process.release()
            return samples.features, str(loaded.facts["weight_digest"])

        return base.samples.first(count, make)

    def _sample(
        self, process: GeneratorProcess, loaded: LoadedGenerator, clock: Clock, *, with_base: bool
    ) -> _Samples:
        """The first samples, and more where one half of them does not show what the other shows."""
        first, names = self._spec.samples, self._spec.names
        most = first if names is None else max(first, self._spec.max_samples)
        most = min(most, loaded.available or most)
        shown = {number * min(first, most) // MOST_THUMBNAILS for number in range(MOST_THUMBNAILS)}
        samples = _Samples()

        def unsure() -> bool:
            # As many as there are take as long as these took.
            in_time = clock.remaining > _PATIENCE * clock.seconds["sample"]
            # As they are kept, so that whoever reads them would decide alike.
            kept = samples.features.astype(np.float16)
            return names is not None and in_time and is_unsure(kept, names)

        for numbers in batches(first, most, unsure):
            self._add(samples, process, loaded, numbers, shown, clock, with_base=with_base)
        return samples

    def _add(
        self,
        samples: _Samples,
        process: GeneratorProcess,
        loaded: LoadedGenerator,
        numbers: range,
        shown: Collection[int],
        clock: Clock,
        *,
        with_base: bool,
    ) -> None:
        """Make the samples of these numbers and keep what is kept of them; of those in ``shown`` a picture.

        ``with_base``: of an adapter, its base's as well.
        """
        height, width = loaded.size
        at_once = max(1, _BYTES_AT_ONCE // (3 * height * width * (2 if with_base and loaded.adapter else 1)))
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            with self._computes(process, clock):
                with clock.part("sample", counts=True):
                    made = process.sample(some, clock.remaining, base=with_base)
                with clock.part("embed"):
                    samples.add(
                        made, self._encoder, [place for place, one in enumerate(some) if one in shown]
                    )

    def _report(self, facts: dict[str, Any], size: int, copy_of: str | None) -> ItemReport:
        return ItemReport(
            bytes=size,
            parameters=int(facts["parameters"]),
            identity=str(facts["identity"]),
            copy_of=copy_of,
            worker=self._name,
        )


class _Samples:
    """What is kept of the samples of one generator."""

    def __init__(self) -> None:
        self._features: list[Float32s] = []
        self._base_features: list[Float32s] = []
        self._prompts: list[npt.NDArray[np.int32]] = []
        self._classes: list[npt.NDArray[np.int32]] = []
        self.thumbnails: list[bytes] = []
        self.batch_size, self.precision = 1, ""

    def add(self, made: SampledImages, encoder: Encoder, shown: Sequence[int]) -> None:
        self._features.append(_embedded(encoder, made.pixels))
        if made.base is not None:
            self._base_features.append(_embedded(encoder, made.base))
        if made.prompts is not None:
            self._prompts.append(made.prompts)
        if made.classes is not None:
            self._classes.append(made.classes)
        self.thumbnails += [thumbnail(Image.fromarray(made.pixels[place])) for place in shown]
        self.batch_size, self.precision = max(self.batch_size, made.batch_size), made.precision

    @property
    def features(self) -> Float32s:
        return np.concatenate(self._features)

    @property
    def base_features(self) -> Float32s | None:
        return np.concatenate(self._base_features) if self._base_features else None

    @property
    def prompts(self) -> list[int] | None:
        return np.concatenate(self._prompts).tolist() if self._prompts else None

    @property
    def classes(self) -> list[int] | None:
        return np.concatenate(self._classes).tolist() if self._classes else None


def _embedded(encoder: Encoder, pixels: npt.NDArray[np.uint8]) -> Float32s:
    return encoder.embed_images(map(Image.fromarray, pixels))


def _downloads(downloaded: Downloaded, base: Base | None) -> list[Downloaded]:
    return [downloaded] if base is None else [downloaded, base.downloaded]


def _encoder(spec: SamplerSpec) -> Encoder:
    import torch

    torch.set_num_threads(max(1, int(spec.settings.cpus_per_worker)))
    encoder = load_encoder(spec.encoder, spec.settings.device)
    if encoder.digest != spec.encoder_digest:
        raise ProbeLogError(
            f"{spec.encoder} is another encoder on this node (digest {encoder.digest[:16]}) than where the job was "
            f"started ({spec.encoder_digest[:16]}): give it as OWNER/NAME@COMMIT, or as the same folder on every node"
        )
    return encoder


def samplers(spec: SamplerSpec, coordinator: CoordinatorHandle) -> Workers:
    """Sampling actors that share a coordinator."""
    return workers(Sampler, spec, coordinator)
