"""Small indexes built straight through the writer: random descriptors, odd facts, a real encoder of random weights."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.completion import scoring
from probelog.encoders.text import TextEncoder
from probelog.index.arrow import fixed_lists
from probelog.index.basis import Basis
from probelog.index.pointer import Pointer
from probelog.index.schema import INDEX_VERSION, MODEL_FACTS, WEAKEST_PROBES, probes_schema
from probelog.index.settings import GenerationSettings
from probelog.index.shortlist import EXACT_LOGITS
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live
from probelog.publication.rows import Ends, LogitBatch, RowEncoder, evidence_of, same_weights, write_tables
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics, Confidence
from probelog.ranking.matched_heads import Observed
from probelog.ranking.names import name_vectors
from probelog.storage.encoding import npy
from probelog.storage.schemas import EDGES, Head, Parent
from probelog.storage.store import Store

PROMPT = "a photo of a {}"
CONFIDENCE = Confidence(1.0, 0.5, 0.25, "declared labels", 100, 50)
TOP_R = 12
BACKGROUND = ["cat", "Golden Retriever", "sea_lion", "chair", "lamp", "bus", "tree", "apple", "violin", "cup"]

ESCAPES = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;owned\x07",
    "two\nlines",
    "back\rwards",
    "\x9b2J",
    "gnp\u202eexe",
    "zero\u200bwidth",
    "tab\tbed",
    "[red]x[/red]",
    "[link=http://example.org]y[/link]",
    "고양이",
    "x" * 300,
    "",
]


@dataclass(frozen=True)
class Model:
    """One model to index. Models of equal ``weights`` get equal descriptors."""

    repo: str
    labels: tuple[str, ...]
    head: str = "softmax"
    weights: str | None = None
    licence: str | None = "mit"
    downloads: int | None = 10
    likes: int | None = 0
    tags: tuple[str, ...] = ()
    created_at: dt.datetime | None = None
    parents: tuple[Parent, ...] = ()

    @property
    def logits(self) -> int:
        return len(self.labels) or 2

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.repo.encode()).hexdigest()

    @property
    def digest(self) -> str | None:
        return self.weights if self.weights is not None else f"digest of {self.repo}"


MODELS_OF_ALL_SORTS = (
    Model("anna/pets", ("cat", "dog", "Golden_Retriever", "3"), licence="mit", downloads=1200),
    Model("bert/pets-copy", ("cat", "dog", "Golden_Retriever", "3"), weights="digest of anna/pets"),
    Model(
        "carl/pets-copy", ("a", "b", "c", "d"), weights="digest of anna/pets", licence=None, downloads=None
    ),
    Model("dora/hot-dog", ("hot dog",), head="single", licence="apache-2.0", downloads=3, tags=("x", "y")),
    Model("emil/things", tuple(f"thing {i}" for i in range(9)), licence="other", downloads=9_876_543_210),
    Model("fake/no-labels", (), licence="cc-by-nc-4.0", downloads=0),
    Model("eve/hostile", tuple(ESCAPES), licence="mit\x1b[2J", downloads=7),
    Model("eve/[red]name[/red]\x1b[31m", ("a", "b"), licence=None, downloads=7),
)


class TextFiles(Protocol):
    """A text encoder as it travels with an index (``TextEncoderFiles``)."""

    onnx: bytes
    tokenizer_json: str
    settings: dict[str, Any]


# Writes further tables, of a generation's space and probes; gives entries for its settings and its ``meta`` table.
WriteFurther = Callable[
    [GenerationWriter, matched_heads.HeadSpace, npt.NDArray[np.float32]],
    tuple[dict[str, Any], dict[str, bytes]],
]

Describe = Callable[[Model, matched_heads.HeadSpace, TextEncoder], npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class SmallIndex:
    """What was written, to compute the expected answers from."""

    store: Store
    pointer: Pointer
    models: tuple[Model, ...]
    owners: list[tuple[int, int, int]]  # (model, logit, sign) of every row
    z: npt.NDArray[np.float64]
    gallery: npt.NDArray[np.float32]  # directions as they are stored
    embeddings: npt.NDArray[np.float32]
    background: list[str]
    background_vectors: npt.NDArray[np.float32]
    encoder: TextEncoder
    batch: LogitBatch  # all logits, those of copies too
    learnt_from: npt.NDArray[np.float32]  # directions that basis and temperature come from
    statistics: ColumnStatistics


def text_encoder(files: TextFiles) -> TextEncoder:
    """The encoder of these files. Its process, which takes half a second to start, serves all indexes that are built."""
    return _text_encoder(files.onnx, files.tokenizer_json, json.dumps(files.settings))


@functools.cache
def _text_encoder(onnx: bytes, tokenizer_json: str, settings: str) -> TextEncoder:
    return TextEncoder(onnx, tokenizer_json, json.loads(settings))


def build(
    index: Store,
    name: str = "first",
    models: Sequence[Model] = MODELS_OF_ALL_SORTS,
    kind: str = "siglip",
    images: bool = True,
    probes: int = 40,
    seed: int = 0,
    live: bool = True,
    settings: dict[str, Any] | None = None,
    exact_logits: int = EXACT_LOGITS,
    files: TextFiles | None = None,
    names: Sequence[str] = BACKGROUND,
    describe: Describe | None = None,
    like: SmallIndex | None = None,
    tamper: Callable[[LogitBatch], LogitBatch] = lambda batch: batch,
    further: Mapping[str, bytes] | None = None,
    edges: pa.Table | None = None,
    write_further: WriteFurther | None = None,
    alone: bool = False,
) -> SmallIndex:
    """Write a generation, and make it the live one. With ``files`` it needs no torch, but has no image encoder.

    A model's logits depend on its weights and the seed alone. ``names`` are the background's. ``describe`` gives the
    directions (L, d) of a model's logits in place of random ones. With ``like`` they are compared as in that index.
    ``tamper`` changes what is written, not what is returned. ``further`` goes into the ``meta`` table.
    ``edges`` are the model trees (``EDGES``); without, there are none. ``write_further`` writes further tables; with
    ``alone`` there is nothing else: the models only fit what all tables share.
    """
    if files is None:
        from tests.support.worlds import tiny_encoders

        files = tiny_encoders.text_files(kind)
    encoder = text_encoder(files)
    random = np.random.default_rng(seed)
    embeddings = random.normal(size=(probes, encoder.dimension)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    made: dict[str, npt.NDArray[np.float64]] = {}
    background = name_vectors(encoder.embed, [PROMPT], names)
    space = matched_heads.HeadSpace(embeddings, background)
    blocks, owners, vectors = [], [], []
    for number, model in enumerate(models):
        key = model.digest or model.repo
        if key not in made:
            own = np.random.default_rng([seed, *key.encode()])
            directions = own.normal(size=(model.logits, encoder.dimension))
            noise = own.normal(size=(model.logits, probes)) * 0.3
            made[key] = scoring.standardise(directions @ embeddings.T + noise)
        for sign in (1, -1) if model.head == "single" else (1,):
            blocks.append(sign * made[key])
            observed = Observed(Head(model.head), np.arange(probes), sign * made[key])
            vector = space.of_model(observed) if describe is None else describe(model, space, encoder)
            vectors.append(vector)
            owners += [(number, i, sign) for i in range(model.logits)]
    everything, gallery = np.concatenate(blocks), np.concatenate(vectors).astype(np.float32)
    writer = GenerationWriter(index, name)
    learnt_from = gallery if like is None else like.learnt_from
    compared = matched_heads.Background(
        space.background, matched_heads.sharpness(learnt_from, space.background)
    )
    first = same_weights([model.digest for model in models])
    kept = [owner for owner in owners if first[owner[0]] == owner[0]]
    distinct = gallery[[first[owner[0]] == owner[0] for owner in owners]]
    statistics = (
        ColumnStatistics.of(distinct, space.background, compared.offsets(distinct), compared.sharpness)
        if like is None
        else like.statistics
    )
    pairs = scoring.top_pairs(everything, TOP_R)
    numbers, places, signs = (np.array(column) for column in zip(*owners, strict=True))
    low = scoring.top_pairs(-everything, WEAKEST_PROBES)
    # Probes with an odd number are said not to have been seen by the models.
    evidence = evidence_of(
        np.arange(0, probes, 2), Ends(pairs.probes, pairs.values), Ends(low.probes, -low.values)
    )
    batch = LogitBatch(numbers, places, signs < 0, gallery, pairs.probes, evidence)
    written = write_tables(
        writer,
        [] if alone else [tamper(batch)],
        model_facts(models, edges).slice(0, 0 if alone else None),
        RowEncoder.fit(learnt_from, compared, probes),
        exact_logits,
    )
    basis = Basis.fit(learnt_from, compared)
    place = {owner: i for i, owner in enumerate(kept)}
    stored = basis.directions(basis.decode(basis.encode(distinct)))
    stored = stored[[place[int(first[model]), logit, sign] for model, logit, sign in owners]]
    thumbnails = [None if i == 1 else f"picture {i}".encode() for i in range(probes)]
    probe_schema = probes_schema(encoder.dimension)
    writer.write(
        "probes",
        probe_schema,
        [
            pa.table(
                {
                    "id": np.arange(probes, dtype=np.int32),
                    "name": [f"{i}.png" for i in range(probes)],
                    "sha256": ["0" * 64] * probes,
                    "thumbnail": pa.array(thumbnails, pa.binary()),
                    "embedding": fixed_lists(embeddings, pa.float32()),
                }
            ).cast(probe_schema)
        ],
    )
    if edges is not None:
        writer.write("edges", EDGES, [edges])
    added, added_meta = ({}, {}) if write_further is None else write_further(writer, space, embeddings)
    facts = some_settings(
        trees=None if edges is None else "d" * 16,
        edges=None if edges is None else edges.num_rows,
        models=0 if alone else len(models),
        logits=written.logits,
        encoder=f"tiny {kind}",
        encoder_digest=f"digest of tiny {kind}",
        sharpness=compared.sharpness,
        text_encoder=files.settings,
        image_encoder=tiny_encoders.image_files(kind).settings if images else None,
        image_encoder_missing=None if images else "it cannot be exported",
        background_concepts=len(names),
        **written.settings,
        **added,
    ).to_dict() | (settings or {})
    meta = {
        "settings": json.dumps(facts).encode(),
        "background": json.dumps(list(names)).encode(),
        "background_vectors.npy": npy(background),
        "background_statistics.npy": npy(np.stack([statistics.means, statistics.stds])),
        "text_encoder.onnx": files.onnx,
        "tokenizer.json": files.tokenizer_json.encode(),
        **written.meta,
        **added_meta,
        **(further or {}),
    }
    if images:
        meta["image_encoder.onnx"] = tiny_encoders.image_files(kind).onnx
    writer.write_meta(meta)
    writer.finish()
    pointer = go_live(index, name, f"source of {name}") if live else Pointer(name, f"source of {name}", "")
    return SmallIndex(
        index,
        pointer,
        tuple(models),
        owners,
        everything,
        stored,
        embeddings,
        list(names),
        background,
        encoder,
        batch,
        learnt_from,
        statistics,
    )


def some_settings(**known: Any) -> GenerationSettings:
    """What a generation says about itself; what is not given is made up."""
    made_up: dict[str, Any] = {
        "version": INDEX_VERSION,
        "made_by": "the tests",
        "probe_set": "a" * 64,
        "observations": "b" * 16,
        "fraction": 1.0,
        "seed": 0,
        "encoder": "tiny",
        "encoder_digest": "digest of tiny",
        "prompts": [PROMPT],
        "method": "matched heads",
        "confidence": CONFIDENCE,
        "background_concepts": len(BACKGROUND),
        "watermark": None,
        "listed": "2026-01-01T00:00:00+00:00",
        "night": None,
        "text_encoder": {},
        "text_encoder_difference": 0.0,
        "image_encoder": None,
        "image_encoder_difference": None,
        "image_encoder_missing": None,
        "rank": 1,
        "regularisation": 1.0,
        "held_out_rmse": 0.5,
        "held_out_top_rmse": 0.5,
        "constant_logits_dropped": 0,
        "completion": "c" * 16,
        "run": {"models": 0, "failures": {}},
    }
    return GenerationSettings(**made_up | known)


def model_facts(models: Sequence[Model], edges: pa.Table | None = None) -> pa.Table:
    """What the ``models`` table says of them; ``edges`` are their trees, each model with one parent that counts."""
    parents = {} if edges is None else dict(zip(*(edges[name].to_pylist() for name in ("child", "parent")), strict=True))  # fmt: skip

    def place(repo: str) -> dict[str, Any]:
        if edges is None:
            return {}
        path = [repo]
        while path[-1] in parents and len(path) < 50:
            path.append(parents[path[-1]])
        return {"root": path[-1], "parent": parents.get(repo), "depth": len(path) - 1}

    rows = [
        {
            "repo": model.repo,
            "sha": model.sha,
            "library": "timm",
            "architecture": "resnet18",
            "head": model.head,
            "logits": model.logits,
            "labels": list(model.labels) or None,
            "licence": model.licence,
            "tags": list(model.tags),
            "created_at": model.created_at,
            "parents": [asdict(parent) for parent in model.parents],
            "downloads": model.downloads,
            "likes": model.likes,
            "weight_digest": model.digest,
            "observed": 10,
            **place(model.repo),
        }
        for model in models
    ]
    return pa.Table.from_pylist(rows, MODEL_FACTS).drop_columns(["copies"])
