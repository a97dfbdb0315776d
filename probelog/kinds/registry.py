"""All kinds of models. A new one is declared here; `docs/architecture.md` says what it has to bring."""

from __future__ import annotations

from probelog.hub.download import download_model
from probelog.kinds.kind import Kind
from probelog.storage import layout
from probelog.storage.ledger import PROBED

CLASSIFIER = Kind(
    name="classifier",
    stage="probe",
    libraries=("transformers", "timm"),
    tasks=("image-classification",),
    download=download_model,
    ledgers=layout.LEDGERS,
    contents=PROBED,
    tables=("models", "logits"),
)

KINDS = (CLASSIFIER,)
