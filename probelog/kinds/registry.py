"""All kinds of models. A new one is declared here; `docs/architecture.md` says what it has to bring."""

from __future__ import annotations

from probelog.generators import download as generators
from probelog.hub import download as classifiers
from probelog.kinds.kind import Kind
from probelog.storage import layout
from probelog.storage.ledger import PROBED, SAMPLED

CLASSIFIER = Kind(
    name="classifier",
    stage="probe",
    libraries=("transformers", "timm"),
    tasks=("image-classification",),
    download=classifiers.download_model,
    foreseen=classifiers.foreseen_files,
    ledgers=layout.LEDGERS,
    contents=PROBED,
    tables=("models", "logits"),
)

GENERATOR = Kind(
    name="generator",
    stage="sample",
    libraries=("diffusers", "peft"),
    tasks=("unconditional-image-generation", "text-to-image"),
    download=generators.download_generator,
    foreseen=generators.foreseen_files,
    ledgers=layout.SAMPLES,
    contents=SAMPLED,
    tables=("generators", "samples", "groups"),
    together=("base_model",),  # a worker keeps the base of the last adapter
)

KINDS = (CLASSIFIER, GENERATOR)
