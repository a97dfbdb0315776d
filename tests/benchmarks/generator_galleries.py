"""Search of generators that are perfect: pictures that the zoo's models learn from stand for what they make.

    uv run probelog-index demo --out DEMO
    uv run python -m tests.benchmarks.generator_galleries DEMO/store OUT
    uv run probelog-index evaluate --kind generator --index DEMO/store --truth OUT/truth.json [--store OUT/more]

Writes queries and truth of the zoo's 48 planned generators (`probelog-index zoo --generators`) into OUT, and publishes an
index in the demo's store with 64 pictures for each of them; OUT/more is a store with a ledger of 512. No model is trained:
the figures say what a method is worth where samples are as good as pictures.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipelines.complete.stage import complete
from pipelines.config.model import Config, Quality
from pipelines.crawl.stage import Catalogue, hub_endpoint
from pipelines.demo.run import FRACTION, WORLD
from pipelines.full import run_crawl
from pipelines.hubserver import running
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.probe.probe_set import ready_probes
from pipelines.publish.generators import SampledGenerators
from pipelines.publish.stage import ListingSnapshot, publish
from pipelines.quality.failures import FailureCounts
from pipelines.zoo.generators.build import GeneratorsRequest, _Facts, pipeline_of
from pipelines.zoo.generators.pictures import Icons
from pipelines.zoo.generators.plan import GeneratorSpec, plan
from pipelines.zoo.generators.styles import styled
from probelog.encoders.torch_encoder import deferred_encoder
from probelog.search.client import open_index
from probelog.storage.layout import LedgerFolder, sample_ledger
from probelog.storage.ledger import SAMPLED, Counts, ItemResult, Ledger, item_key
from probelog.storage.schemas import SAMPLES, CatalogueRow, SampledModel
from probelog.storage.store import Store

SIZE = 32
KEPT, MORE = 64, 512
_SHOWN = 12
SHA = "0" * 40


def main() -> None:
    """Make both ledgers, and publish the smaller."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="the demo's")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--generators", type=int, default=48)
    arguments = parser.parse_args()
    pictures = Icons(2 * SIZE, 0)
    specs = plan(pictures.names, arguments.generators, 0)
    facts = _Facts(GeneratorsRequest(arguments.out), pictures)
    job = Job.of(_config(arguments.store), Report())
    encoder = deferred_encoder(job.config.encoder)
    ledgers = {
        KEPT: Ledger(job.store, sample_ledger(f"galleries{KEPT}"), SAMPLED),
        MORE: Ledger(Store(arguments.out / "more"), sample_ledger(f"galleries{MORE}"), SAMPLED),
    }
    with open_index(arguments.store) as index:
        for spec in specs:
            (arguments.out / "hub" / spec.repo).mkdir(parents=True, exist_ok=True)
            facts.add(spec)
            for count, ledger in ledgers.items():
                shown = _pictures(spec, pictures, count)
                features = np.concatenate(
                    [
                        index.embed_images([Image.fromarray(one) for one in shown[start : start + 64]])
                        for start in range(0, len(shown), 64)
                    ]
                )
                ledger.spool(
                    item_key(spec.repo, SHA),
                    result(spec.repo, pipeline_of(spec), [*shown], features, encoder.digest),
                )
    facts.write()
    for ledger in ledgers.values():
        ledger.seal([item_key(spec.repo, SHA) for spec in specs])
    rows = [CatalogueRow(spec.repo, SHA) for spec in specs]
    _publish(job, SampledGenerators.of(ledgers[KEPT], f"galleries{KEPT}", rows))


def _config(store: Path) -> Config:
    return Config(
        store=str(store),
        probes=str(WORLD / "probes.parquet"),
        probe_count=None,
        encoder=str(WORLD / "encoder"),
        background=str(WORLD / "concepts.txt"),
        fraction=FRACTION,
        batch_models=16,
        # The demo's own generators are gone then.
        quality=Quality(enforce=False),
    )


def _pictures(spec: GeneratorSpec, pictures: Icons, count: int) -> npt.NDArray[np.uint8]:
    """So many pictures (n, size, size, 3) that a planned generator would learn from, of all its concepts alike."""
    each = count // len(spec.concepts) + 1
    lessons = np.concatenate([styled(pictures.lessons(one)[:each], spec.style) for one in spec.concepts])
    chosen = lessons[np.random.default_rng(spec.seed).permutation(len(lessons))[:count]]
    small = [Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BOX) for one in chosen]
    return np.stack([np.asarray(one) for one in small])


def result(
    repo: str,
    pipeline: str,
    shown: Sequence[npt.NDArray[np.uint8]],
    features: npt.NDArray[np.float32],
    encoder: str,
) -> ItemResult:
    """What a ledger keeps of one generator; ``shown`` are pictures, of which a few are kept."""
    thumbnails = []
    for one in shown[:_SHOWN]:
        sink = io.BytesIO()
        Image.fromarray(one).save(sink, "WEBP", quality=90)
        thumbnails.append(sink.getvalue())
    count = len(features)
    made = SampledModel(
        repo, SHA, pipeline, "gallery", "none", SIZE, 0, count, 1, encoder, "F32", "cpu", repo, identity=repo,
        thumbnails=thumbnails,
    )  # fmt: skip
    rows = {
        "repo": [repo] * count,
        "sha": [SHA] * count,
        "number": [*range(count)],
        "prompt": [None] * count,
        "class": [None] * count,
        "feature": [*features.astype(np.float16)],
        "base_feature": [None] * count,
    }
    return ItemResult.success(made, pa.table(rows, schema=SAMPLES))


def _publish(job: Job, sampled: SampledGenerators) -> None:
    """A generation of the demo's classifiers and of these generators."""
    encoder = deferred_encoder(job.config.encoder)
    with running(WORLD / "hub") as endpoint:
        os.environ["HF_ENDPOINT"] = endpoint
        run_crawl(job)
        listed = ListingSnapshot.of(Catalogue.open(job, hub_endpoint()))
        probe_set = ready_probes(job, encoder)
        key = job.observations_key(probe_set.hash)
        receipts = Ledger(job.store, LedgerFolder.of(key).path).receipts(originals=False)
        completed = complete(job, key, receipts, probe_set, encoder.digest)
        counts = sum((receipt.counts for receipt in receipts), Counts())
        run = FailureCounts.of(counts.indexed, counts.failures)
        publish(job, listed, probe_set, encoder, key, receipts, completed, run, sampled=sampled)


if __name__ == "__main__":
    main()
