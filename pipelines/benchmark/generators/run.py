"""Evaluation of generators: every method on every query of a truth file, beside what bounds them and what needs no index."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.benchmark.generators.features import sampled_features
from pipelines.benchmark.generators.figures import EncoderFigures, GeneratorEvaluation, MethodFigures
from pipelines.benchmark.generators.truth import IMAGE, SKETCH, TEXT, GeneratorTruth, Query
from pipelines.benchmark.generators.ways import Queries, Questions, Scored, figures_of, scored, ways_of
from pipelines.labels.hub_search import ListedModel, ModelSearch, word_searches
from probelog.arrays import Floats, Ints, values_of
from probelog.errors import UsageError
from probelog.evaluation.accuracy import Float64, bootstrap
from probelog.evaluation.generators import class_means, nearest_is_right, nearest_of_others
from probelog.index.generation import Generation
from probelog.index.generators.encoding import description_type
from probelog.index.pointer import find_index, read_pointer
from probelog.ranking.samples.description import Descriptions, unit
from probelog.ranking.samples.matched import SampleSpace
from probelog.search.client import Index
from probelog.search.generators.query import asked, by_direction
from probelog.search.query import text_vectors
from probelog.storage.store import Store

SAMPLES = (8, 16, 32, 64)
# Queries by a picture and its concept's name together, and by what another generator makes.
IMAGE_AND_TEXT, GENERATOR = "image and text", "generator"
THIS_INDEX = "this index"
_READ = {TEXT: "names", IMAGE: "real pictures", SKETCH: "sketches of real pictures"}


def evaluate_generators(
    uri: str, truth_file: Path, samples: Sequence[int] = (), store: str | None = None
) -> GeneratorEvaluation:
    """Evaluate search of generators on an index.

    Args:
        uri: the index or its store.
        truth_file: see ``GeneratorTruth``.
        samples: numbers of samples of each generator, the first ones; all that there are besides. By default ``SAMPLES``.
        store: whose ledger of samples is read, in place of what the index keeps.

    Raises:
        UsageError: the truth file is unusable or speaks of none of the index's generators, or there are no samples.
        QueryError: the index holds no generators or no image encoder, or a picture cannot be read.
    """
    truth = GeneratorTruth.read(truth_file)
    folder = find_index(uri)
    generation = Generation(folder, read_pointer(folder)[0])
    with Index(folder, generation) as index:
        held = generation.generators
        features: dict[str, Floats] = {
            repo: rows @ held.axes for repo, rows in zip(held.repos, held.features(), strict=True)
        }
        if store is not None:
            features = _read_features(Store(store), generation, features.keys())
        repos = [repo for repo in features if repo in truth.concepts]
        if not repos:
            raise UsageError(f"{truth_file} speaks of none of the generators in {folder.uri}")
        rows = [features[repo] for repo in repos]
        most = max(map(len, rows))
        described = {
            count: Descriptions.of([item[:count] for item in rows])
            for count in sorted({*(count for count in samples or SAMPLES if count < most), most})
        }
        vectors = {
            modality: _queries(index, generation, modality, queries)
            for modality, queries in truth.by_modality.items()
        }
        space = _space(generation)
        methods: list[MethodFigures] = []
        questions = {
            name: item
            for name, item in _questions(truth, repos, vectors, described[most], space)
            if item.present.any()
        }
        ways = ways_of(space)
        for name, item in questions.items():
            found = [*scored(item, described, ways)]
            if name in vectors and store is None:
                found.append(
                    _by_client(index, generation, truth.by_modality[name], name, vectors[name], repos, most)
                )
            methods += figures_of(name, item, found)
        return GeneratorEvaluation(
            index=folder.uri,
            generators=len(repos),
            chance={name: float(item.relevant[item.present].mean()) for name, item in questions.items()},
            methods=methods,
            encoder=_encoder(generation, truth, vectors, rows, repos),
            searches=_searches(index, truth, repos),
            bytes_a_model=float(description_type(len(held.axes)).itemsize),
        )


def _read_features(store: Store, generation: Generation, repos: Collection[str]) -> dict[str, Floats]:
    """Features of the index's generators from a ledger.

    Raises:
        UsageError: it holds none of them, or of another encoder.
    """
    read = sampled_features(store, generation.settings.encoder_digest)
    features = {repo: read[repo] for repo in repos if repo in read}
    if not features:
        raise UsageError(f"{store.uri} has samples of none of the generators in the index")
    return features


def _space(generation: Generation) -> SampleSpace:
    """What the index's own method scores with, in the encoder's space."""
    settings, head = generation.generators.settings, generation.space
    parts = (head.centre, head.background, head.texts)
    centre, background, texts = (np.asarray(item, np.float32) for item in parts)
    return SampleSpace(centre, background, texts, settings.direction_sharpness, settings.embedding_sharpness)


def _queries(index: Index, generation: Generation, modality: str, queries: Sequence[Query]) -> Queries:
    """Queries of one modality as the encoder embeds them, and as the index asks them."""
    if modality == TEXT:
        names = [query.text for query in queries]
        return Queries(text_vectors(generation, names), [asked(generation, [name])[0] for name in names])
    files = [query.file for query in queries if query.file is not None]
    vectors = index.embed_images(files) if modality == IMAGE else index.embed_sketch(files)
    name = "pictures" if modality == IMAGE else "sketches"
    return Queries(vectors, [asked(generation, **{name: row[None]})[0] for row in vectors])


def _questions(
    truth: GeneratorTruth,
    repos: Sequence[str],
    vectors: Mapping[str, Queries],
    models: Descriptions,
    space: SampleSpace,
) -> Iterator[tuple[str, Questions]]:
    """The questions of each modality, of pictures with their names, and of generators that make the like of another."""
    numbers = {name: number for number, name in enumerate(sorted({query.concept for query in truth.queries}))}
    for modality, queries in truth.by_modality.items():
        groups = np.array([numbers[query.concept] for query in queries])
        yield modality, Questions([vectors[modality]], groups, truth.relevant(queries, repos))
    shown, named = (truth.by_modality.get(modality, []) for modality in (IMAGE, TEXT))
    if shown and named:
        names = {query.concept: place for place, query in enumerate(named)}
        places = np.array([place for place, query in enumerate(shown) if query.concept in names], np.int64)
        queries = [shown[place] for place in places]
        said = vectors[TEXT].at(np.array([names[query.concept] for query in queries], np.int64))
        groups = np.array([numbers[query.concept] for query in queries])
        yield (
            IMAGE_AND_TEXT,
            Questions([vectors[IMAGE].at(places), said], groups, truth.relevant(queries, repos)),
        )
    makes = [truth.concepts[repo] for repo in repos]
    alike = np.array([[bool(one & other) for other in makes] for one in makes]) & ~np.eye(
        len(repos), dtype=bool
    )
    some = np.flatnonzero(alike.any(axis=1))
    if len(some):
        of_models = models.at(some)
        queries_by_model = Queries(
            unit(np.asarray(of_models.means, np.float64)),
            [by_direction(row) for row in space.mean_directions(of_models)],
        )
        # Of all concepts that a generator makes, the first by name stands for it where intervals are drawn.
        groups = np.array([numbers.get(min(makes[number]), len(numbers)) for number in some])
        yield GENERATOR, Questions([queries_by_model], groups, alike[some], own=some)


def _by_client(
    index: Index,
    generation: Generation,
    queries: Sequence[Query],
    modality: str,
    vectors: Queries,
    repos: Sequence[str],
    samples: int,
) -> Scored:
    """What a user gets: the client's answers, its confidence in the first, and the time with the embedding of a text."""
    # An answer stands for all repositories that make the same samples.
    table = generation.generators.rows(["repo", "row"])
    row_of = dict(zip(values_of(table["repo"], str), values_of(table["row"], int), strict=True))
    places: dict[int, list[int]] = {}
    for place, repo in enumerate(repos):
        places.setdefault(row_of[repo], []).append(place)
    scores = np.full((len(queries), len(repos)), -np.inf)
    presence, times = np.zeros(len(queries)), []
    for number, query in enumerate(queries):
        vector = vectors.embeddings[number][None]
        options: dict[str, Any] = {
            TEXT: {"text": query.text},
            IMAGE: {"embeddings": vector},
            SKETCH: {"sketch_embeddings": vector},
        }[modality]
        began = time.perf_counter()
        hits = index.search(kind="generator", k=max(1, index.generators), **options)
        times.append(time.perf_counter() - began)
        for hit in hits:
            scores[number, places.get(row_of[hit.repo], [])] = hit.score
        presence[number] = hits[0].confidence or 0.0
    return Scored(THIS_INDEX, samples, scores, presence, 1000 * float(np.median(times)))


def _encoder(
    generation: Generation,
    truth: GeneratorTruth,
    vectors: Mapping[str, Queries],
    rows: Sequence[Floats],
    repos: Sequence[str],
) -> list[EncoderFigures]:
    """How well the encoder reads real pictures, their sketches, names, and what the generators made."""
    concepts = sorted({query.concept for query in truth.queries})
    names = text_vectors(generation, concepts)
    numbers = {name: number for number, name in enumerate(concepts)}
    classes = {
        modality: np.array([numbers[query.concept] for query in queries])
        for modality, queries in truth.by_modality.items()
    }
    means = None
    if IMAGE in vectors:
        means = class_means(vectors[IMAGE].embeddings, classes[IMAGE], len(concepts))
    figures = []
    for modality, own in classes.items():
        right = own[:, None] == np.arange(len(concepts))
        embeddings = vectors[modality].embeddings
        by_pictures = None
        if means is not None and modality == IMAGE:
            by_pictures = nearest_of_others(embeddings, own, len(concepts))
        elif means is not None:
            by_pictures = nearest_is_right(embeddings, means, right)
        by_name = None if modality == TEXT else nearest_is_right(embeddings, names, right)
        figures.append(_figures(_READ[modality], by_name, by_pictures, own, len(concepts)))
    owners = np.repeat(np.arange(len(repos)), [len(item) for item in rows])
    right = np.array([[name in truth.concepts[repo] for name in concepts] for repo in repos])[owners]
    samples = np.concatenate(rows)
    by_name = nearest_is_right(samples, names, right)
    by_pictures = None if means is None else nearest_is_right(samples, means, right)
    return [*figures, _figures("samples of the generators", by_name, by_pictures, owners, len(concepts))]


def _figures(
    pictures: str, by_name: Float64 | None, by_pictures: Float64 | None, groups: Ints, concepts: int
) -> EncoderFigures:
    named, pictured = (
        None if values is None else bootstrap(values[:, None], groups=groups)[0]
        for values in (by_name, by_pictures)
    )
    return EncoderFigures(pictures, named, pictured, concepts, len(groups))


def _searches(index: Index, truth: GeneratorTruth, repos: Sequence[str]) -> list[ModelSearch]:
    """The names that are asked, by words of what the repositories say of themselves."""
    names = list(dict.fromkeys(query.text for query in truth.queries if query.modality == TEXT))
    concepts = {query.text: query.concept for query in truth.queries if query.modality == TEXT}
    right = np.array([[concepts[name] in truth.concepts[repo] for repo in repos] for name in names], bool)
    if not right.any():
        return []
    facts = index.generators(columns=["repo", "tags", "classes", "trigger_words", "downloads"]).to_pylist()
    listed = {
        row["repo"]: ListedModel(
            row["repo"],
            [*(row["tags"] or ()), *(row["trigger_words"] or ())],
            row["classes"] or [],
            row["downloads"] or 0,
        )
        for row in facts
    }
    return word_searches(names, right, [listed[repo] for repo in repos])
